"""Multi-query associative recall of a model that was trained on it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge
from torch import Tensor

from smelt.data.mqar import Mqar as Corpus
from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities
from smelt.evaluate._text import room
from smelt.spec import Paper, SmeltError

__all__ = ["Mqar"]


@dataclass(frozen=True)
class Mqar(Probe):
    """mqar_accuracy = share of the queries k_i of a sequence after which arg-max over the vocabulary is v_i.

    The sequences are the test split of the corpus `mqar` with the same `pairs`, `length`, `words` and `seed`, so a model trained on
    that corpus (data: mqar(pairs=8)) is asked what it learned and has never seen. An answer of several tokens is right when each is the
    arg-max behind those before it. Chance is 1 / vocabulary; a model that knows the kinds of words but not the pairs has
    1 / words. A model that never saw such text scores near 0: the probe `recall` is for those. Samples are right answers per
    sequence, weights its queries.

    With a cache bound the pairs are one call and what follows comes `chunk` tokens at a time. Cost: sequences * length
    forward positions (more where a word is several tokens). Raises SmeltError for a model without next tokens or a context too short.
    """

    paper: ClassVar = Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "arXiv:2312.04927", "section 3.1")
    sequences: Annotated[int, Ge(1)] = 64
    pairs: Annotated[int, Ge(1)] = 8
    length: Annotated[int, Ge(4)] = 64  # words
    words: Annotated[int, Ge(1)] = 256  # of each kind
    seed: Annotated[int, Ge(0)] = 0
    batch: Annotated[int, Ge(1)] = 64
    chunk: Annotated[int, Ge(1)] = 1  # tokens of a call through a cache, behind the pairs

    def __post_init__(self) -> None:
        self.corpus()

    @classmethod
    def example(cls) -> Self:
        return cls(sequences=4, pairs=3, length=16, words=20)

    def corpus(self) -> Corpus:
        """What such a model is trained on, with at least `sequences` held-out sequences."""
        return Corpus(pairs=self.pairs, length=self.length, words=self.words, seed=self.seed, count=max(4096, 16 * self.sequences))

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "mqar")
        rows, answers, shown = [], [], []
        for words, places in islice(self.corpus().sequences("test"), self.sequences):
            ids, spans = spell(variant.tokenizer, words)
            rows.append(ids)
            answers.append([spans[place] for place in places])
            shown.append(spans[2 * self.pairs][0])
        longest = max(map(len, rows))
        if longest > room(model, longest):
            raise SmeltError(f"mqar: length={self.length} needs {longest} tokens of context")
        hits = log_probabilities(variant, rows, batch=self.batch, prefill=min(shown), chunk=self.chunk, read=_top)
        right = [sum(bool(found[low - 1 : high - 1].all()) for low, high in row) for found, row in zip(hits, answers, strict=True)]
        samples, weights = tuple(map(float, right)), tuple(float(len(row)) for row in answers)
        return [Metric("mqar_accuracy", sum(samples) / sum(weights), "share of queries", "higher", samples, weights)]


def spell(tokenizer: Any, words: list[str]) -> tuple[list[int], list[tuple[int, int]]]:
    """(ids with the start token before them, the tokens [low, high) of each word); a space before every word."""
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    ids, spans = list(start), []
    for word in words:
        found = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        spans.append((len(ids), len(ids) + len(found)))
        ids += found
    return ids, spans


def _top(scores: Tensor, following: Tensor, row: int) -> Tensor:
    return (scores.argmax(-1) == following).float()
