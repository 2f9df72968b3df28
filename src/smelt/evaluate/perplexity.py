"""Bits per byte and perplexity on held-out text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from annotated_types import Ge

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities, sees_only_what_came, windows
from smelt.evaluate._text import encoded, room
from smelt.spec import Paper, SmeltError

__all__ = ["Perplexity"]


@dataclass(frozen=True)
class Perplexity(Probe):
    """bits_per_byte = -sum_i log2 p(x_i | x_<i) / bytes(x); perplexity = exp(-sum_i ln p(x_i | x_<i) / tokens).

    Over the beginnings of documents of the test split, each after a start token. Windows of `context` tokens (at
    most the model's own limit) start every `stride` tokens, so a token is predicted once, from at least
    min(its position, context - stride) tokens. Bits per byte compare across tokenizers, perplexity does not.
    Samples are bits per document, weights its bytes. perplexity has no samples: it is no ratio of sums.

    With a cache bound, every window goes through a fresh cache: `prefill` tokens in one call, then `chunk` at a
    time, so that attention sees the compressed keys. Tokens of the same call see each other in full precision.

    by_position adds bits_per_byte_first (tokens 0 to 127 of a document) and bits_per_byte_late (1,024 to 2,047),
    over the same documents, those with more than 1,024 tokens: the difference is what the context is worth, up to
    the difference between the beginning of a file and its middle.

    Cost: tokens * context / stride forward positions at most. Raises SmeltError for a model that does not predict
    next tokens, a stride above the context, or by_position without documents or context long enough.
    """

    paper: ClassVar = Paper("The Pile", "arXiv:2101.00027", "bits per UTF-8 encoded byte")
    tokens: Annotated[int, Ge(1)] = 32_768  # budget, at 4 characters each, so that every tokenizer reads the same text
    document: Annotated[int, Ge(1)] = 1536  # most of one document, counted alike: below `context`, so that one window suffices
    context: Annotated[int, Ge(1)] = 2048
    stride: Annotated[int, Ge(1)] = 1024
    batch: Annotated[int, Ge(1)] = 8  # rows of a call; figures change with it only for attention that is prompt_wide: there 1
    prefill: Annotated[int, Ge(1)] = 256  # first call through a cache
    chunk: Annotated[int, Ge(1)] = 64  # later calls through a cache
    by_position: bool = False

    def __post_init__(self) -> None:
        if self.stride > self.context:
            raise SmeltError(f"perplexity: stride={self.stride} is larger than context={self.context}, so tokens would be left out")

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=600, document=200, context=64, stride=32, batch=3, prefill=16, chunk=8)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "perplexity")
        sees_only_what_came(variant, "perplexity")
        documents = encoded(variant, self.tokens, self.document)
        context = room(model, self.context)
        cuts = [(at, *w) for at, d in enumerate(documents) for w in windows(len(d.ids), context, min(self.stride, context))]
        rows = [documents[at].ids[first : last + 1] for at, first, last, _ in cuts]
        scores = log_probabilities(variant, rows, batch=self.batch, prefill=self.prefill, chunk=self.chunk)
        bits = [np.zeros(len(d.ids)) for d in documents]  # of each token; the first is given
        for (at, first, last, done), found in zip(cuts, scores, strict=True):
            bits[at][done : last + 1] = -found[done - first - 1 :] / math.log(2)
        sizes = [d.bytes * (np.arange(len(d.ids)) > 0) for d in documents]
        count = sum(len(d.ids) - 1 for d in documents)
        metrics = [
            _per_byte("bits_per_byte", [b.sum() for b in bits], [s.sum() for s in sizes]),
            Metric("perplexity", float(2 ** (sum(b.sum() for b in bits) / count)), "per token", "lower"),
        ]
        return metrics + (self._positions(bits, sizes, documents, context) if self.by_position else [])

    @staticmethod
    def _positions(bits: list[np.ndarray], sizes: list[np.ndarray], documents: list, context: int) -> list[Metric]:
        long = [i for i, d in enumerate(documents) if len(d.ids) - d.start > 1024]
        if not long or context < 2048:
            raise SmeltError("by_position needs a context of 2,048 and a document of more than 1,024 tokens in the test split")
        metrics = []
        for name, low, high in (("bits_per_byte_first", 0, 128), ("bits_per_byte_late", 1024, 2048)):
            spans = [slice(low + documents[i].start, high + documents[i].start) for i in long]
            parts = [bits[i][s].sum() for i, s in zip(long, spans)]
            metrics.append(_per_byte(name, parts, [sizes[i][s].sum() for i, s in zip(long, spans)]))
        return metrics


def _per_byte(name: str, bits: list, sizes: list) -> Metric:
    samples, weights = tuple(float(b) for b in bits), tuple(float(s) for s in sizes)
    return Metric(name, sum(samples) / sum(weights), "bits per byte", "lower", samples, weights)
