"""Does perplexity tell text of the kind a model was made for from text of another kind?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from annotated_types import Ge

from smelt.data import Corpus, Document, Split
from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities
from smelt.evaluate._text import CHARACTERS, choose, corpus_of, encode, room
from smelt.spec import Paper, SmeltError

__all__ = ["OutOfDistribution"]


@dataclass(frozen=True)
class OutOfDistribution(Probe):
    """ood_auroc = P(s(y) > s(x)) + P(s(y) = s(x)) / 2, s = mean_i -ln p(z_i | z_<i): x a piece of known text, y of other text.

    Known are pieces of the test split of the variant's data, other are pieces of the test split of `corpus`; without one,
    paragraphs of the Python language reference (`pydoc_data`), which the corpus stdlib leaves out: prose about the same
    subject, never trained on there. A piece is at most `document` tokens (counted as 4 characters each) of whole lines, so the two
    kinds have equal lengths; those below half of that are left out. A start token comes before each.

    ood_aupr   average precision of finding other text by a high score: sum_n (R_n - R_n-1) P_n, equal scores together
    ood_far95  share of other text that passes where the lowest threshold lets at least 95 % of the known text pass
    Equal scores are treated alike in all three, so a model that gives every piece one score has 0.5, the share of other pieces, 1.
    No samples: none of them is a ratio of sums over one set of parts.

    Cost: 2 * tokens forward positions. A piece that is longer than the model's context is cut there; with a cache bound it is
    read as in the probe perplexity. Raises SmeltError for a model that does not predict next tokens and for text without a piece.

    Differs from the paper: which class is positive for AUPR and FAR95 is not established: reconstruction (other text is found,
    false acceptance is of other text); pieces of documents instead of sentences.
    """

    paper: ClassVar = Paper(
        "Multi-Level Knowledge Distillation for Out-of-Distribution Detection in Text", "arXiv:2211.11300", "its measures"
    )
    corpus: Corpus | None = None  # the other text; a corpus of files gives all of it with test=0.99
    tokens: Annotated[int, Ge(1)] = 16_384  # of each kind
    document: Annotated[int, Ge(1)] = 64
    batch: Annotated[int, Ge(1)] = 32
    prefill: Annotated[int, Ge(1)] = 16
    chunk: Annotated[int, Ge(1)] = 16

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=400, document=40, batch=8, prefill=8, chunk=8)

    def __call__(self, variant: Variant) -> list[Metric]:
        decoder(variant, "out_of_distribution")
        known = self.scores(variant, corpus_of(variant))
        other = self.scores(variant, Reference() if self.corpus is None else self.corpus)
        return [
            Metric("ood_auroc", auroc(known, other), "probability", "higher"),
            Metric("ood_aupr", aupr(known, other), "average precision", "higher"),
            Metric("ood_far95", far95(known, other), "share of other text", "lower"),
        ]

    def scores(self, variant: Variant, corpus: Any) -> np.ndarray:
        """Mean nats per token of each piece."""
        pieces = choose(Pieces(corpus, CHARACTERS * self.document), self.tokens, self.document)
        room_ = room(variant.model, 1 << 30)
        rows = [row for row in (encode(variant.tokenizer, piece.text).ids[: room_ + 1] for piece in pieces) if len(row) > 1]
        if not rows:
            raise SmeltError("out_of_distribution: the text has no piece of two tokens, so there is nothing to score")
        found = log_probabilities(variant, rows, batch=self.batch, prefill=self.prefill, chunk=self.chunk)
        return np.array([-float(row.mean()) for row in found])


@dataclass(frozen=True)
class Pieces:
    """A corpus cut into runs of whole lines of at most `longest` characters; shorter ones than half of it are left out."""

    corpus: Any
    longest: int

    def documents(self, split: Split) -> Iterator[Document]:
        for name, text in self.corpus.documents(split):
            for at, piece in enumerate(self._cut(text)):
                if 2 * len(piece.strip()) >= self.longest:
                    yield Document(f"{name}#{at}", piece)

    def _cut(self, text: str) -> Iterator[str]:
        piece = ""
        for line in text.splitlines(keepends=True):
            if piece and len(piece) + len(line) > self.longest:
                yield piece
                piece = ""
            piece += line
            while len(piece) > self.longest:  # one long line
                yield piece[: self.longest]
                piece = piece[self.longest :]
        yield piece

    def digest(self) -> str:
        return f"pieces-{self.longest}-{self.corpus.digest()}"


@dataclass(frozen=True)
class Reference:
    """The paragraphs of the Python language reference, one document per topic; headings, code and grammar are left out."""

    def documents(self, split: Split) -> Iterator[Document]:
        for name in sorted(topics):
            found = [part for part in topics[name].split("\n\n") if len(part) > 100 and not part[0].isspace() and "::=" not in part]
            if found and split == "test":
                yield Document(name, "\n\n".join(found) + "\n")

    def digest(self) -> str:
        return f"reference-{sum(map(len, topics.values()))}"


def auroc(known: np.ndarray, other: np.ndarray) -> float:
    """P(other > known) + P(other = known) / 2 over all pairs; O(n log n)."""
    order = np.sort(known)
    twice = np.searchsorted(order, other, "left") + np.searchsorted(order, other, "right")
    return float(twice.sum() / (2 * len(known) * len(other)))


def aupr(known: np.ndarray, other: np.ndarray) -> float:
    """Average precision of `other` as the positive class, found from the highest score down."""
    levels = np.unique(np.concatenate([known, other]))[::-1]
    right = len(other) - np.searchsorted(np.sort(other), levels, "left")  # positives at or above each level
    wrong = len(known) - np.searchsorted(np.sort(known), levels, "left")
    return float((np.diff(right, prepend=0) * right / (right + wrong)).sum() / len(other))


def far95(known: np.ndarray, other: np.ndarray) -> float:
    """Share of `other` at or below the lowest threshold that at least 95 % of `known` do not exceed."""
    threshold = np.sort(known)[math.ceil(95 * len(known) / 100) - 1]
    return float((other <= threshold).mean())
