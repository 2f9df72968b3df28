"""Finding functions by their docstrings: how well a model reranks what BM25 found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from annotated_types import Ge, Le

from smelt.data._code_search import by_chance, candidates, functions, held_out, ndcg
from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, query_likelihood
from smelt.model._load import Loaded
from smelt.rank import Asked
from smelt.rank._order import order
from smelt.spec import Paper

__all__ = ["CodeSearch"]

TOGETHER = 8  # queries whose windows are read as one batch


@dataclass(frozen=True)
class CodeSearch(Probe):
    """code_search_ndcg10 = mean over queries of 1 / log2(1 + place of the function), 0 below place 10.

    `queries` first sentences of docstrings from held-out modules of the standard library; the `passages` functions
    (docstring removed) that BM25 puts first among all of them are ordered by the variant's `rank` method, or,
    without one, by query likelihood: sum_i log p(query_i | passage, query_<i), the passage cut to `length` tokens.
    A function that BM25 did not find cannot be found again and counts 0.

    Beside it, the same for every variant: code_search_bm25 (the first stage's own order), code_search_oracle (the
    relevant passage first whenever it was found) and code_search_random (expected of a random order). Samples are
    per query, weights 1: 100 queries tell differences of about 0.05.

    Cost: queries * passages * (length + query) forward positions at most. Raises SmeltError for a model without a
    language head when there is no rank method. Differs from the paper: no instruction around the passage, as these
    models were not trained to follow one; the query follows as a docstring would.
    """

    paper: ClassVar = Paper("Improving Passage Retrieval with Zero-Shot Question Generation", "arXiv:2204.07496", "query likelihood")
    queries: Annotated[int, Ge(1)] = 100
    passages: Annotated[int, Ge(1), Le(1000)] = 10
    length: Annotated[int, Ge(1)] = 96  # most tokens of a passage that are read
    batch: Annotated[int, Ge(1)] = 32
    prefill: Annotated[int, Ge(1)] = 64
    chunk: Annotated[int, Ge(1)] = 64

    @classmethod
    def example(cls) -> Self:
        return cls(queries=3, passages=4, length=32)

    def __call__(self, variant: Variant) -> list[Metric]:
        every = functions()
        found = {q: candidates(q, self.passages) for q in held_out(self.queries)}
        if variant.rank is None:
            orders = self._by_likelihood(variant, found)
        else:
            loaded = Loaded(variant.model, variant.tokenizer, variant.folder)
            orders = {}
            queries = list(found)
            for start in range(0, len(queries), TOGETHER):
                some = queries[start : start + TOGETHER]
                asked = [Asked(every[q].query, [every[i].passage for i in found[q]]) for q in some]
                for query, places in zip(some, order(variant.rank, asked, loaded), strict=True):
                    orders[query] = [found[query][i] for i in places]
        chance = by_chance(self.passages)
        return [
            _mean("code_search_ndcg10", ndcg(orders)),
            _mean("code_search_bm25", ndcg(found)),
            _mean("code_search_oracle", [float(q in first) for q, first in found.items()]),
            _mean("code_search_random", [chance * (q in first) for q, first in found.items()]),
        ]

    def _by_likelihood(self, variant: Variant, found: dict[int, tuple[int, ...]]) -> dict[int, list[int]]:
        decoder(variant, "code_search")
        every, how = functions(), {"batch": self.batch, "prefill": self.prefill, "chunk": self.chunk}
        asked = [Asked('\n    """' + every[q].query, [every[i].passage for i in first]) for q, first in found.items()]
        scores = query_likelihood(variant, asked, self.length, **how)
        return {q: [first[i] for i in np.argsort(-score, kind="stable")] for (q, first), score in zip(found.items(), scores, strict=True)}


def _mean(name: str, samples: list[float]) -> Metric:
    return Metric(name, sum(samples) / len(samples), "nDCG@10", "higher", tuple(samples), (1.0,) * len(samples))
