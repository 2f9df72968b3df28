"""Which sentences of retrieved text a reader should be given: the compressor is taught by what helps the reader."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from smelt.rank import Asked
from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import Dense, in_batch
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["Recomp"]


@dataclass(frozen=True)
class Recomp(Dense, Learns):
    """score(q, s) = <e(q), e(s)> of a sentence s; compress(q) = the `keep` sentences of largest score, in the order they had.

    The passages given to this judge are the sentences (or lines) of what was retrieved. `compress` breaks passages up,
    judges all of their sentences at once and returns the text to put before a reader; sentences that score below `least` are
    dropped, so it may be empty, and then the reader is asked without (selective augmentation). Choose `least` on held-out
    questions, as scores are raw products.

    Trained on lists whose grades say how much each sentence helps the reader: `labels` is the judge that grades with
    the teacher of the stage, the reader; pointwise(length=160) is the reader's mean log p(query | sentence) in nats per
    token. The positive is the sentence of the largest grade, wherever it stands; negatives are those graded lower by `gap` or
    more, and the other lists' sentences; what lies between is left out. loss = -log softmax of the products at the
    positive, at temperature 1 (the held embedding's), over all of these in the batch. A list without a clear negative
    still has those of the others.

    Cost: that of the held embedding(); grading reads every sentence once with the reader. Scores compare between calls.

    Raises SmeltError for a judge that is no embedding().

    Differs from the paper: one encoder for both sides; the reader is scored on the query's own text, as lists have no
    answer beside it (exact match of answers needs a question set). Where negatives begin is a reconstruction, and so are the ends of
    sentences: . ! ? before a blank, and every line. Left out: the abstractive compressor, whose summaries come
    from a large model by prompts that are not established here.
    """

    paper: ClassVar = Paper(
        "RECOMP: Improving Retrieval-Augmented LMs with Compression and Selective Augmentation", "arXiv:2310.04408", "extractive compressor"
    )
    judge: Any = field(default_factory=lambda: Embedding(normalize=False, length=100, temperature=1.0))
    keep: Annotated[int, Ge(1)] = 2  # sentences
    least: float | None = None  # score below which a sentence is dropped; None keeps `keep` of them always
    gap: Annotated[float, Ge(0)] = 0.1  # of grades, between the positive and a negative
    labels: Any = None  # judge that the reader, the teacher of the stage, grades sentences with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding):
            raise SmeltError(f"recomp: judge={self.judge!r} is no embedding(); use recomp(judge=embedding(normalize=False))")

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        return self.judge.embed(texts, model, query)

    def compress(self, asked: Sequence[Asked], model: Any) -> list[str]:
        """Of each question what is left of its passages: the chosen sentences joined by single spaces, perhaps none."""
        parts = [Asked(a.query, [s for passage in a.passages for s in sentences(passage)]) for a in asked]
        some = [a for a in parts if a.passages]
        scores = iter(self.scores(some, model) if some else [])
        found = []
        for a in parts:
            score = next(scores) if a.passages else torch.empty(0)
            best = torch.argsort(score, descending=True, stable=True)[: self.keep]
            kept = [i for i in best.tolist() if self.least is None or float(score[i]) >= self.least]
            found.append(" ".join(a.passages[i] for i in sorted(kept)))
        return found

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        return self.judge.collate([clear(one, self.gap) for one in lists], model, context)

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ((queries, passages),) = self.judge.pairs(model, batch)
        return in_batch(queries, passages, batch, self.judge.temperature)


def clear(one: Labelled, gap: float) -> Labelled:
    """The best graded passage first, then those graded lower by `gap` or more (and lower at all), in their order."""
    best = max(range(len(one.grades)), key=lambda i: one.grades[i])
    worse = [i for i, grade in enumerate(one.grades) if grade < one.grades[best] and grade <= one.grades[best] - gap]
    return one._replace(passages=[one.passages[i] for i in (best, *worse)], grades=[one.grades[i] for i in (best, *worse)])


def sentences(text: str) -> list[str]:
    """Lines, broken after . ! ? that a blank follows; without those that are blank."""
    return [s.strip() for line in text.splitlines() for s in re.split(r"(?<=[.!?])\s+", line) if s.strip()]
