"""A long list ordered by a judge that reads a few passages at a time, from the back to the front."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from smelt.rank import Judge, Rounds, Strategy
from smelt.rank._order import fits
from smelt.rank.first_token import FirstToken
from smelt.spec import Paper, SmeltError

__all__ = ["SlidingWindow"]


@dataclass(frozen=True)
class SlidingWindow(Strategy):
    """Order places [end - window, end) for end = n, n - step, ... until a window starts at place 0; `passes` times.

    calls(n) = passes (1 + ceil(max(0, n - window) / step)), 0 for n = 0. With a judge that sorts by one fixed score
    the first window - step places are exact after one pass, and as many more after each further one; the tail is not
    sorted. A noisy judge gains from more passes. Passages read <= window x calls.

    Raises SmeltError for a step that is not below the window (nothing would move up), for a window the judge cannot
    take, and for an answer of the judge that is not an order.

    Differs from the paper: the window at the front is clamped to place 0. The authors' loop stops one short when
    n - window is not a multiple of step and never reads the head of the list.
    """

    paper: ClassVar = Paper("Is ChatGPT Good at Search? (RankGPT)", "arXiv:2304.09542", "section 3.2, sliding window strategy")
    judge: Judge = FirstToken()  # noqa: RUF009 (it is frozen)
    window: Annotated[int, Ge(2)] = 20
    step: Annotated[int, Ge(1)] = 10
    passes: Annotated[int, Ge(1)] = 1

    def __post_init__(self) -> None:
        fits(self, self.window)
        if self.step >= self.window:
            raise SmeltError(
                f"sliding_window: step={self.step} must be below window={self.window}, or nothing moves up from window to window"
            )

    def rounds(self, n: int) -> Rounds:
        ranked = list(range(n))
        for _ in range(self.passes if n else 0):
            end = n
            while True:
                start = max(0, end - self.window)
                part = ranked[start:end]
                (answer,) = yield [part]
                ranked[start:end] = [part[i] for i in answer.order]
                if start == 0:
                    break
                end -= self.step
        return ranked

    def calls(self, n: int) -> int:
        return self.passes * (1 + -(-max(0, n - self.window) // self.step)) if n else 0

    def chain(self, n: int) -> int:
        return self.calls(n)

    def exact_top(self, n: int) -> int:
        return n if n <= self.window else min(n, self.passes * (self.window - self.step))
