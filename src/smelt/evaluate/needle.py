"""One line in a long text: is it found again, by its depth and the length of the text?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
from annotated_types import Ge, Interval
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities
from smelt.evaluate._text import room
from smelt.spec import Paper, SmeltError

__all__ = ["Needle"]

PAIR = {"code": "{} =", "text": "The number of {} is"}
END = {"code": "\n", "text": ".\n"}
FILLER = {
    "code": ("{} = {}({})\n", "if {} in {}:\n", "    return {}.{}\n", "for {} in {}:\n", "    {}.append({})\n", "def {}(self, {}):\n"),
    "text": ("The {} of the {} was {}.\n", "Nobody saw the {} and the {}.\n", "A {} is not a {}.\n", "When the {} came, the {} left.\n"),
}
NOUNS = ("name", "path", "value", "list", "index", "file", "table", "river", "stone", "garden", "letter", "window", "market", "engine")


class Asked(NamedTuple):
    row: list[int]
    question: int  # tokens of the question, in front of the value
    answer: int  # tokens of the value, at the end of the row
    lead: int  # tokens that all values begin with
    options: list[int]  # the token behind them of every planted value, the right one first


@dataclass(frozen=True)
class Needle(Probe):
    """needle_recall = share of questions whose value wins: p(v | text with "k = v" at the depth, "k =") > p(v') for the other planted v'.

    A text of `length` tokens is generated: lines of code or prose, `choices` planted lines of a made-up key and a number, at
    the end the first half of one of them. That one stands at `depth` of the text (0 its beginning, 1 its end), the others anywhere.
    by="choice": values start with different tokens, and the right one must have the highest probability among
    these; chance is 1 / choices. by="exact": greedy decoding writes the whole value (each token is the arg-max behind the right ones
    before it, which is the same). needle_bits = -log2 p(value), in bits per value, is finer than either. Besides, needle_LENGTH_DEPTH
    (depth in percent) is the recall of one cell. Samples are questions. Texts follow from `seed` and the tokenizer alone.

    With a cache bound the text is one call and the question comes token by token, so what a cache lost is not found.
    Cost: sum(lengths) * depths * questions forward positions. Raises SmeltError for a length above the model's own context
    (beyond=True reads it all the same), or too short for its lines. Differs from the paper: the text is generated, not
    essays; the answer is scored and not judged; other keys stand beside the right one.
    """

    paper: ClassVar = Paper("Needle In A Haystack", "https://github.com/gkamradt/LLMTest_NeedleInAHaystack", "depth by length")
    lengths: tuple[int, ...] = (512, 1024)  # tokens
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    questions: Annotated[int, Ge(1)] = 8  # of each length and depth
    choices: Annotated[int, Interval(ge=2, le=9)] = 4
    by: Literal["choice", "exact"] = "choice"
    text: Literal["code", "text"] = "code"
    beyond: bool = False
    seed: Annotated[int, Ge(0)] = 0
    batch: Annotated[int, Ge(1)] = 8

    def __post_init__(self) -> None:
        if not self.lengths or not self.depths or min(self.lengths) < 1 or not all(0 <= depth <= 1 for depth in self.depths):
            raise SmeltError(
                f"needle: lengths={self.lengths} have to be positive and depths={self.depths} within 0 and 1, at least one each"
            )
        if len(set(self.lengths)) < len(self.lengths) or len({round(100 * depth) for depth in self.depths}) < len(self.depths):
            raise SmeltError(f"needle: lengths={self.lengths} and depths={self.depths} must differ, depths by a percent")

    @classmethod
    def example(cls) -> Self:
        return cls(lengths=(200,), depths=(0.0, 1.0), questions=2, choices=2)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "needle")
        hits: list[float] = []
        bits: list[float] = []
        cells: list[Metric] = []
        for length in self.lengths:
            if not self.beyond and length > room(model, length):
                raise SmeltError(
                    f"needle: length={length} is more than the {room(model, length)} tokens of the model; beyond=True reads it"
                )
            for depth in self.depths:
                found = self._ask(variant, list(self.asked(variant.tokenizer, length, depth)))
                cells.append(_share(f"needle_{length}_{round(100 * depth)}", [hit for hit, _ in found]))
                hits += [hit for hit, _ in found]
                bits += [bit for _, bit in found]
        total = Metric("needle_bits", sum(bits) / len(bits), "bits per value", "lower", tuple(bits), (1.0,) * len(bits))
        return [_share("needle_recall", hits), total, *cells]

    def _ask(self, variant: Variant, asked: list[Asked]) -> list[tuple[float, float]]:
        """(hit, bits) of every question."""
        read: list[list[tuple[float, bool, int]]] = [[] for _ in asked]  # log p, is it on top, the best option; for each token of the value

        def look(scores: Tensor, following: Tensor, row: int) -> Tensor:
            log = scores.float().log_softmax(-1)
            best = log[:, asked[row].options].argmax(-1)
            own = log.gather(-1, following[:, None])[:, 0]
            read[row] += zip(own.tolist(), (log.argmax(-1) == following).tolist(), best.tolist(), strict=True)
            return own

        rows = [one.row for one in asked]
        prefill = min(len(one.row) - one.question - one.answer for one in asked)
        log_probabilities(variant, rows, batch=self.batch, prefill=prefill, chunk=1, last=[one.answer for one in asked], read=look)
        return [
            (
                float(all(top for _, top, _ in tokens) if self.by == "exact" else tokens[one.lead][2] == 0),
                -sum(p for p, _, _ in tokens) / math.log(2),
            )
            for one, tokens in zip(asked, read, strict=True)
        ]

    def asked(self, tokenizer: Any, length: int, depth: float) -> Iterator[Asked]:
        """The questions of one cell; every row has `length` tokens and the value besides."""
        start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        for at in range(self.questions):
            random = np.random.default_rng([self.seed, length, round(100 * depth), at])
            keys, values, lead = self._pairs(tokenizer, random)
            planted = [_ids(tokenizer, f"{PAIR[self.text].format(k)} {v}{END[self.text]}") for k, v in zip(keys, values, strict=True)]
            question = _ids(tokenizer, PAIR[self.text].format(keys[0]))
            left = length - len(start) - len(question) - sum(map(len, planted))
            lines: list[list[int]] = []
            while left > 0:
                line = FILLER[self.text][random.integers(len(FILLER[self.text]))]
                ids = _ids(tokenizer, line.format(*random.choice(NOUNS, line.count("{}"))))
                lines.append(ids[-left:])
                left -= len(ids)
            if not lines:
                raise SmeltError(f"needle: length={length} is too short for {self.choices} planted lines; twice as much will do")
            lines.insert(0, lines.pop())  # the one that was cut
            for other in planted[1:]:
                lines.insert(int(random.integers(1, len(lines) + 1)), other)
            lines.insert(1 + _place(lines[1:], depth), planted[0])
            answers = [_ids(tokenizer, f" {value}") for value in values]
            row = [*start, *(i for line in lines for i in line), *question, *answers[0]]
            yield Asked(row, len(question), len(answers[0]), lead, [answer[lead] for answer in answers])

    def _pairs(self, tokenizer: Any, random: np.random.Generator) -> tuple[list[str], list[str], int]:
        """Made-up keys, numbers of four digits that differ in one token, and how many tokens (a space) all have before it."""
        keys: dict[str, None] = {}
        while len(keys) < self.choices:
            keys["".join(f"{random.choice(list('bdfgklmnprstvz'))}{random.choice(list('aeiou'))}" for _ in range(3))] = None
        space = _ids(tokenizer, " 4")
        lead = int(space[0] == _ids(tokenizer, " 7")[0])
        values: dict[int, str] = {}
        for _ in range(1000):
            value = str(random.integers(1000, 10_000))
            ids = _ids(tokenizer, f" {value}")
            if ids[:lead] == space[:lead]:
                values.setdefault(ids[lead], value)
            if len(values) == self.choices:
                return list(keys), list(values.values()), lead
        raise SmeltError(f"needle: this tokenizer begins no {self.choices} numbers with different tokens; take fewer choices")


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _place(lines: list[list[int]], depth: float) -> int:
    """Before which of the lines the needle stands, to be as near as can be to this share of their tokens."""
    ends = np.cumsum([0] + [len(line) for line in lines])
    return int(np.abs(ends - depth * ends[-1]).argmin())


def _share(name: str, hits: list[float]) -> Metric:
    return Metric(name, sum(hits) / len(hits), "share of questions", "higher", tuple(hits), (1.0,) * len(hits))
