"""Bits per byte by the position in a long document: what more context is worth, and where a method begins to lose."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from annotated_types import Ge

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities
from smelt.evaluate._text import Encoded, choose, corpus_of, encode, room
from smelt.spec import Paper, SmeltError

__all__ = ["Position"]

SEARCHED = 64  # times the text that is measured; as much is looked through for long documents


@dataclass(frozen=True)
class Position(Probe):
    """bits_per_byte_from_a = -sum_{a <= i < b} log2 p(x_i | x_<i) / bytes(x_a .. x_b-1): [0, first), [first, 2 first), doubling on.

    The first `length` tokens of held-out documents that are at least as long, so every bucket is of the same documents;
    `documents` of them, in the order of the hash of their names. Positions count predicted tokens, without the start token.
    The last bucket ends at `length`. `length` gives way to the model's own context; with beyond=True it does not,
    which shows what a method is worth there (rotary angles go on; learned positions end with an error of the model's).
    A bucket differs from the first also because the middle of a file is other text than its beginning: compare variants.

    With a cache bound: `prefill` tokens in one call, then `chunk` at a time. Samples are documents, weights bytes.
    Cost: documents * length forward positions. Raises SmeltError where the test split has no document as long.
    """

    paper: ClassVar = Paper("Do Long-Range Language Models Actually Use Long-Range Context?", "arXiv:2109.09115", "perplexity by position")
    documents: Annotated[int, Ge(1)] = 8
    length: Annotated[int, Ge(2)] = 2048  # tokens
    first: Annotated[int, Ge(1)] = 128  # tokens of the first bucket
    beyond: bool = False
    batch: Annotated[int, Ge(1)] = 4
    prefill: Annotated[int, Ge(1)] = 256
    chunk: Annotated[int, Ge(1)] = 64

    @classmethod
    def example(cls) -> Self:
        return cls(documents=3, length=100, first=16, prefill=32, chunk=16)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "position")
        found = long(variant, self.documents, self.length if self.beyond else room(model, self.length + 1) - 1)
        rows = [d.ids for d in found]
        scores = log_probabilities(variant, rows, batch=self.batch, prefill=self.prefill, chunk=self.chunk)
        bits = [
            -score[d.start - 1 :] / math.log(2) if d.start else np.concatenate([[0.0], -score / math.log(2)])
            for d, score in zip(found, scores)
        ]
        sizes = [d.bytes[d.start :] * ((np.arange(len(d.ids) - d.start) > 0) | bool(d.start)) for d in found]
        metrics, low, high, end = [], 0, self.first, len(bits[0])
        while low < end:
            samples = tuple(float(b[low:high].sum()) for b in bits)
            weights = tuple(float(s[low:high].sum()) for s in sizes)
            metrics.append(Metric(f"bits_per_byte_from_{low}", sum(samples) / sum(weights), "bits per byte", "lower", samples, weights))
            low, high = high, 2 * high
        return metrics


def long(variant: Any, documents: int, length: int) -> list[Encoded]:
    """Documents of `length` tokens behind the start token, if there is one; all equally long."""
    found: list[Encoded] = []
    for document in choose(corpus_of(variant), SEARCHED * documents * length, 4 * length):
        if len(document.text) < length:
            continue
        one = encode(variant.tokenizer, document.text)
        if len(one.ids) - one.start >= length:
            found.append(Encoded(one.ids[: length + one.start], one.bytes[: length + one.start], one.start))
        if len(found) == documents:
            break
    if not found:
        raise SmeltError(
            f"position: no document of the test split has {length} tokens; take a smaller length, or data with longer documents"
        )
    return found
