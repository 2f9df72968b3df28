"""Lists to learn code search from: a sentence of a docstring, its function, and functions it is not."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import bm25s
import numpy as np
from annotated_types import Ge, Interval

from smelt.data import Corpus, Document, Split
from smelt.data._code_search import Function, documented, split_identifiers
from smelt.data._lists import Row
from smelt.data.stdlib import Stdlib
from smelt.spec import Paper

__all__ = ["CodePairs"]

DEEP = 100  # places of BM25 that hard negatives are drawn from


@dataclass(frozen=True)
class CodePairs:
    """(query, [positive, negatives...], [1, 0, ...]) of every documented Python function of `corpus`, as the task `code_search`.

    Of `passages` - 1 negatives a share `hard` (rounded) is drawn from BM25's first 100 other functions for the query, the rest
    from all functions of the same split; no other split is looked at. Drawn by a hash of the function's name, so that
    the same corpus gives the same lists. As a corpus (`documents`) it is `corpus` itself.

    Cost: parsing the split and one BM25 search per function (1 ms among 5,000). Functions with fewer than four words in
    their first sentence are left out. `sentences="all"`: a list for each sentence of a docstring that says as much, the first and
    the others, each with negatives of its own: more questions for the same functions. Differs from the paper: negatives of
    BM25 are mixed with random ones by a share.
    """

    paper: ClassVar = Paper("Dense Passage Retrieval for Open-Domain Question Answering", "arXiv:2004.04906", "section 3.2, negatives")
    corpus: Corpus = Stdlib()  # noqa: RUF009 (it is frozen)
    passages: Annotated[int, Ge(2)] = 8  # of a list
    hard: Annotated[float, Interval(ge=0, le=1)] = 0.5
    sentences: Literal["first", "all"] = "first"

    def documents(self, split: Split) -> Iterator[Document]:
        return self.corpus.documents(split)

    def digest(self) -> str:
        return hashlib.sha256(f"code_pairs {self.corpus.digest()} {self.passages} {self.hard} {self.sentences}".encode()).hexdigest()

    def functions(self, split: Split) -> list[Function]:
        return [f for d in self.corpus.documents(split) for f in documented(d.name, split, d.text)]

    def lists(self, split: Split) -> Iterator[Row]:
        every = self.functions(split)
        if len(every) < self.passages:
            return
        index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
        index.index([split_identifiers(f.passage) or [""] for f in every], show_progress=False)
        wanted = round(self.hard * (self.passages - 1))
        asked = [(at, query) for at, one in enumerate(every) for query in (one.query, *(one.more if self.sentences == "all" else ()))]
        for at, query in asked:
            one = every[at]
            draw = random.Random(hashlib.sha256((one.name if query == one.query else f"{one.name} {query}").encode()).digest())
            near: list[int] = []
            words = [word for word in split_identifiers(query) if word in index.vocab_dict] if wanted else []
            if words:
                scores = index.get_scores(words)
                best = np.argpartition(-scores, min(DEEP, len(every) - 1))[: DEEP + 1]
                near = [int(i) for i in best if i != at and scores[i] > 0 and every[i].passage != one.passage]
                near = draw.sample(sorted(near), min(wanted, len(near)))
            chosen = {at, *near}
            while len(chosen) < self.passages:
                chosen.add(draw.randrange(len(every)))
            others = [*near, *sorted(chosen - {at, *near})]
            yield Row(query, [one.passage, *(every[i].passage for i in others)], [1.0] + [0.0] * len(others))
