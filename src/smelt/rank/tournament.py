"""Groups whose best go on to the next stage, until one window is left: few calls after each other, on noisy judges too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from smelt.rank import Judge, Rounds, Strategy
from smelt.rank._order import fits
from smelt.rank.first_token import FirstToken
from smelt.spec import Paper, SmeltError

__all__ = ["Tournament"]


@dataclass(frozen=True)
class Tournament(Strategy):
    """m -> g keep, the best of g = ceil(m / window) groups, until m <= window; that window is the top.

    Groups of a stage are seeded: place i goes to group i mod g, so sizes differ by at most one and the first stage's best
    meet late. Who goes on is ordered by place in its group, then by the order before; those who do not stand behind,
    in the same way, a later stage before an earlier one.

    calls(n) = 1 for 1 <= n <= window, else g + calls(g keep); chain(n) is the number of stages, as the groups of one are
    read at the same moment. For n = 100 by the defaults 5 + 3 + 2 + 1 = 11 calls in a chain of 4 (a sliding window: 9 in a chain
    of 9), passages read 100 + 50 + 30 + 20. exact_top(n) = n for n <= window, else keep, and no more: if the best keep + 1
    share a group, one of them is out in the first stage.

    Raises SmeltError for keep above window / 2, with which a stage may drop nobody.

    Differs from the paper: a reconstruction from its public summary (grouping in stages, seeding, points). It sums the points of
    several tournaments with shuffled groups, and the judge only picks who goes on; here there is one tournament, the
    judge orders each group, and the last window's order is the top of the result.
    """

    paper: ClassVar = Paper(
        "TourRank: Utilizing Large Language Models for Documents Ranking with a Tournament-Inspired Strategy",
        "arXiv:2406.11678",
        "one tournament",
    )
    judge: Judge = FirstToken()  # noqa: RUF009 (it is frozen)
    window: Annotated[int, Ge(2)] = 20
    keep: Annotated[int, Ge(1)] = 10  # of each group

    def __post_init__(self) -> None:
        fits(self, self.window)
        if 2 * self.keep > self.window:
            raise SmeltError(
                f"tournament: keep={self.keep} is more than half of window={self.window}, so a stage may drop nobody; "
                f"keep={self.window // 2} is the most"
            )

    def rounds(self, n: int) -> Rounds:
        ranked, behind = list(range(n)), list[int]()
        while len(ranked) > self.window:
            groups = -(-len(ranked) // self.window)
            parts = [ranked[g::groups] for g in range(groups)]
            answers = yield parts
            before = {passage: at for at, passage in enumerate(ranked)}
            found = [(place, before[part[i]], part[i]) for part, a in zip(parts, answers, strict=True) for place, i in enumerate(a.order)]
            found.sort()
            ranked = [passage for place, _, passage in found if place < self.keep]
            behind = [passage for place, _, passage in found if place >= self.keep] + behind
        if ranked:
            (answer,) = yield [ranked]
            ranked = [ranked[i] for i in answer.order]
        return ranked + behind

    def calls(self, n: int) -> int:
        return sum(self._stages(n))

    def chain(self, n: int) -> int:
        return sum(1 for _ in self._stages(n))

    def exact_top(self, n: int) -> int:
        return n if n <= self.window else self.keep

    def _stages(self, n: int) -> Iterator[int]:
        """Groups of each stage."""
        while n > self.window:
            groups = -(-n // self.window)
            yield groups
            n = groups * self.keep  # no group is smaller than half a window
        if n:
            yield 1
