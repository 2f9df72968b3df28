"""The full order of a list by a judge that reads a few passages at a time: what a model for full ranking is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from smelt.rank import Judge, Rounds, Strategy
from smelt.rank._order import fits
from smelt.rank.first_token import FirstToken
from smelt.spec import Paper, SmeltError

__all__ = ["CompleteLabels"]


@dataclass(frozen=True)
class CompleteLabels(Strategy):
    """Pass p = 0..P-1 slides over places [p step, n) from the back and freezes the next step; P = 1 + ceil(max(0, n - window) / step).

    Pass p has P - p windows (clamped to its first place), so calls(n) = P (P + 1) / 2 for every n, 0 for n = 0: 45 for 100 passages by
    the defaults. exact_top(n) = n for a judge that sorts by one fixed score, as a pass makes window - step >= step places exact.
    Passages read <= window x calls.

    Window k of pass p is read at moment k + p c, c = ceil(window / step): the windows of earlier passes that overlap it are done by
    then, those of one moment share no passage, and the order that comes out is the one of pass after pass.
    chain(n) = P + sum over q = 1..P-1 of min(c - 1, q), which is 2 P - 1 for step = window / 2: 17 for 100 passages, not 45.

    Raises SmeltError for a step above window / 2, after which frozen places could be wrong.

    Differs from the paper: passes overlap in time (the same calls, the same result), and every n is taken, not only those
    with n - window a multiple of step.
    """

    paper: ClassVar = Paper(
        "Sliding Windows Are Not the End: Exploring Full Ranking with Long-Context Large Language Models",
        "arXiv:2412.14574",
        "complete listwise label construction",
    )
    judge: Judge = FirstToken()  # noqa: RUF009 (it is frozen)
    window: Annotated[int, Ge(2)] = 20
    step: Annotated[int, Ge(1)] = 10

    def __post_init__(self) -> None:
        fits(self, self.window)
        if 2 * self.step > self.window:
            raise SmeltError(
                f"complete_labels: step={self.step} is more than half of window={self.window}; a pass makes window - step places exact "
                f"and freezes step of them, so step={self.window // 2} is the most"
            )

    def rounds(self, n: int) -> Rounds:
        ranked, passes, apart = list(range(n)), self._passes(n), self._apart()
        for moment in range(1 + (passes - 1) * apart if n else 0):
            spans = []
            for p in range(min(passes, moment // apart + 1)):
                end = n - (moment - p * apart) * self.step
                if moment - p * apart < passes - p:
                    spans.append((max(p * self.step, end - self.window), end))
            if not spans:  # the last passes are shorter than their distance
                continue
            answers = yield [ranked[start:end] for start, end in spans]
            for (start, end), answer in zip(spans, answers, strict=True):
                part = ranked[start:end]
                ranked[start:end] = [part[i] for i in answer.order]
        return ranked

    def calls(self, n: int) -> int:
        return self._passes(n) * (self._passes(n) + 1) // 2 if n else 0

    def chain(self, n: int) -> int:
        passes, apart = self._passes(n), self._apart()
        return passes + sum(min(apart - 1, q) for q in range(1, passes)) if n else 0

    def exact_top(self, n: int) -> int:
        return n

    def _passes(self, n: int) -> int:
        return 1 + -(-max(0, n - self.window) // self.step)

    def _apart(self) -> int:
        return -(-self.window // self.step)
