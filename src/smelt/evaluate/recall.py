"""Associative recall: does the model still find what stands in its context?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities
from smelt.evaluate._text import room
from smelt.spec import Paper, SmeltError

__all__ = ["Recall"]


@dataclass(frozen=True)
class Recall(Probe):
    """associative_recall = share of queries k_j with argmax_i p(v_i | k_1 v_1 ... k_n v_n ... k_j) = j.

    Each sequence: a start token, `pairs` of a key and a value, then `queries` of the keys in random order, each
    followed by its value. Keys and values are single tokens, all different within a sequence; which ones follows
    from `seed` and the tokenizer alone. Words are used where the vocabulary has enough of them. Samples are right
    answers per sequence, weights its queries. Chance is 1 / pairs; with among="vocabulary" the arg-max is over all
    tokens, as in the paper, and small models that never saw such text score zero.

    With a cache bound the pairs are one call (`prefill` in perplexity's words) and every later token is a call of
    its own, as when decoding, so a cache that forgets or blurs the pairs shows here first.

    Cost: sequences * (1 + 2 pairs + 2 queries) forward positions. Raises SmeltError when queries exceed pairs, the
    sequence exceeds the model's context, or the vocabulary is too small. Differs from the paper: measures a model
    as it is instead of training on the task, so queries follow all pairs, are uniform, and compete with the values shown.
    """

    paper: ClassVar = Paper("Zoology", "arXiv:2312.04927", "multi-query associative recall")
    sequences: Annotated[int, Ge(1)] = 64
    pairs: Annotated[int, Ge(1)] = 16
    queries: Annotated[int, Ge(1)] = 8
    among: Literal["values", "vocabulary"] = "values"  # what the right answer competes with
    seed: int = 0
    batch: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        if self.queries > self.pairs:
            raise SmeltError(f"recall: queries={self.queries} is more than pairs={self.pairs}; each key is asked for once")

    @classmethod
    def example(cls) -> Self:
        return cls(sequences=4, pairs=8, queries=4)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "recall")
        rows = self.rows(variant.tokenizer)
        if len(rows[0]) > room(model, len(rows[0])):
            raise SmeltError(f"recall: pairs={self.pairs} and queries={self.queries} need {len(rows[0])} tokens of context")
        shown = len(rows[0]) - 2 * self.queries
        values = torch.tensor([row[shown - 2 * self.pairs + 1 : shown : 2] for row in rows])

        def hit(scores: Tensor, following: Tensor, row: int) -> Tensor:
            if self.among == "vocabulary":
                return (scores.argmax(-1) == following).float()
            shown_values = values[row].to(scores.device)
            return (shown_values[scores[:, shown_values].argmax(-1)] == following).float()

        last = [2 * self.queries - 1] * len(rows)
        hits = log_probabilities(variant, rows, batch=self.batch, prefill=shown, chunk=1, last=last, read=hit)
        samples = tuple(float(found[shown::2].sum()) for found in hits)  # the answer to a key at i is predicted at i
        weights = (float(self.queries),) * len(rows)
        return [Metric("associative_recall", sum(samples) / sum(weights), "share of queries", "higher", samples, weights)]

    def rows(self, tokenizer: Any) -> list[list[int]]:
        """Ids of every sequence: start, k_1 v_1 ... k_n v_n, then (key, value) `queries` times."""
        random = np.random.default_rng(self.seed)
        words = _words(tokenizer, 2 * self.pairs)
        start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        rows = []
        for _ in range(self.sequences):
            pairs = random.choice(words, (self.pairs, 2), replace=False)
            asked = pairs[random.permutation(self.pairs)[: self.queries]]
            rows.append(start + pairs.flatten().tolist() + asked.flatten().tolist())
        return rows


def _words(tokenizer: Any, wanted: int) -> list[int]:
    """Ids of tokens that begin a word of at least three letters; of any ordinary token when those are too few."""
    special = set(tokenizer.all_special_ids)
    texts = {i: tokenizer.decode([i]) for i in range(len(tokenizer)) if i not in special}
    for fit in (lambda t: t[:1] == " " and t[1:].isascii() and t[1:].isalpha() and len(t) > 3, lambda t: True):
        found = [i for i, text in texts.items() if fit(text)]
        if len(found) >= wanted:
            return found
    raise SmeltError(f"recall: {wanted} different tokens are needed, the vocabulary has {len(texts)}")
