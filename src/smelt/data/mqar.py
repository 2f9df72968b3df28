"""Multi-query associative recall as text: pairs to remember, asked for again after more and more of other words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Ge, Gt

from smelt.data import SPLITS, Document, Split
from smelt.spec import Paper, SmeltError

__all__ = ["Mqar"]


@dataclass(frozen=True)
class Mqar:
    """k_1 v_1 ... k_n v_n, then slots of two words: every k_i v_i again at slot g, p(g) ~ g^(power - 1), fillers elsewhere.

    A document is one sequence of `length` words, each with a space before it. Keys, values and fillers are words of their own
    kinds (kaa, vab, xac), `words` of each, so a tokenizer trained on the corpus has one token per word; keys are all
    different within a sequence. Training on it is ordinary training on text: model: mistral(data=mqar()), data: mqar().
    Sequences follow from (seed, split, number) alone. Cost: about 0.1 ms a document.

    Raises SmeltError where the length leaves fewer slots than pairs, or there are fewer words than pairs. Differs from the paper:
    fillers are words of their own, not any token, so a filler never is a key; the loss is over all words (the probe
    counts the answers only).
    """

    paper: ClassVar = Paper("Zoology: Measuring and Improving Recall in Efficient Language Models", "arXiv:2312.04927", "appendix E")
    pairs: Annotated[int, Ge(1)] = 8
    length: Annotated[int, Ge(4)] = 64  # words
    words: Annotated[int, Ge(1)] = 256  # of each kind
    power: Annotated[float, Gt(0)] = 0.01  # below 1: mostly asked soon; 1: anywhere
    count: Annotated[int, Ge(1)] = 4096  # of the train split; the held-out ones have a sixteenth, at least 64
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        if self.slots < self.pairs:
            raise SmeltError(f"mqar: length={self.length} leaves {max(0, self.slots)} slots for {self.pairs} queries; 4 * pairs are enough")
        if self.words < self.pairs:
            raise SmeltError(f"mqar: words={self.words} is fewer than pairs={self.pairs}, and keys do not repeat")

    @property
    def slots(self) -> int:
        """Places of two words behind the pairs."""
        return (self.length - 2 * self.pairs) // 2

    def documents(self, split: Split) -> Iterator[Document]:
        for at, (words, _) in enumerate(self.sequences(split)):
            yield Document(f"mqar/{split}/{at}", " " + " ".join(words) + "\n")

    def sequences(self, split: Split) -> Iterator[tuple[list[str], list[int]]]:
        """(words, places of those that answer a query, rising)."""
        chance = np.arange(1, self.slots + 1) ** (self.power - 1.0)
        chance /= chance.sum()
        for at in range(self.count if split == "train" else max(64, self.count // 16)):
            random = np.random.default_rng([self.seed, SPLITS.index(split), at])
            keys = [f"k{_letters(i)}" for i in random.choice(self.words, self.pairs, replace=False)]
            values = [f"v{_letters(i)}" for i in random.integers(self.words, size=self.pairs)]
            words = [word for pair in zip(keys, values, strict=True) for word in pair]
            words += [f"x{_letters(i)}" for i in random.integers(self.words, size=2 * self.slots)]
            answers = []
            for pair, slot in enumerate(random.choice(self.slots, self.pairs, replace=False, p=chance)):
                place = 2 * self.pairs + 2 * int(slot)
                words[place : place + 2] = keys[pair], values[pair]
                answers.append(place + 1)
            yield words, sorted(answers)

    def digest(self) -> str:
        return f"mqar-1-{self.pairs}-{self.length}-{self.words}-{self.power!r}-{self.count}-{self.seed}"


def _letters(number: int) -> str:
    """aa, ab, ..., zz, baa, ...: at least two letters, so that no word is one."""
    text = ""
    while number or len(text) < 2:
        number, rest = divmod(int(number), 26)
        text = chr(97 + rest) + text
    return text
