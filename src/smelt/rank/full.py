"""All passages in one window: what a judge with a long context can do without a strategy, as a baseline to the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from smelt.rank import Judge, Rounds, Strategy
from smelt.rank._order import fits
from smelt.rank.permutation_text import PermutationText
from smelt.spec import Paper

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Strategy):
    """order = judge(places 0..n-1), one window.

    calls(n) = chain(n) = 1 (0 for n = 0), passages read n, exact_top(n) = n. A sliding window of 20 by 10 reads 1.8 n passages
    in 9 dependent calls at n = 100. A judge whose errors grow with the window loses here: with noise of standard
    deviation 1 on the grades of each call, one window ends at 0.714 nDCG@10 and windows of 20 by 10 at 0.777
    (TREC DL 2019, BM25 top-100, measured for the notes). The authors find full ranking worse than windows until
    a model is trained for it.

    Raises SmeltError for more passages than the judge takes; a judge that cuts texts to its context cuts them shorter.

    Differs from the paper: the strategy only; its loss is `permutation_text(importance=True)`, its labels are `complete_labels`.
    """

    paper: ClassVar = Paper(
        "Sliding Windows Are Not the End: Exploring Full Ranking with Long-Context Large Language Models",
        "arXiv:2412.14574",
        "full ranking",
    )
    judge: Judge = PermutationText()  # noqa: RUF009 (it is frozen)

    def __post_init__(self) -> None:
        fits(self)

    def rounds(self, n: int) -> Rounds:
        if not n:
            return []
        (answer,) = yield [list(range(n))]
        return answer.order

    def calls(self, n: int) -> int:
        return min(1, n)

    def chain(self, n: int) -> int:
        return min(1, n)

    def exact_top(self, n: int) -> int:
        return n
