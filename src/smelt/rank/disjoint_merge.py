"""Windows that share no passage, read at the same moment, merged by score: for judges whose scores compare across calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge

from smelt.rank import Judge, Rounds, Strategy
from smelt.rank._order import fits
from smelt.rank.self_calibrated import SelfCalibrated
from smelt.spec import Paper, SmeltError

__all__ = ["DisjointMerge"]


@dataclass(frozen=True)
class DisjointMerge(Strategy):
    """order = argsort_i of -s_i, stable, s = scores of places [0, w), [w, 2 w), ..., each window judged alone.

    calls(n) = ceil(n / w), chain(n) = 1 (0 for n = 0), passages read n: at n = 100, w = 20 five calls at one moment, where a
    sliding window needs nine, one after the other. exact_top(n) = n for a judge that sorts by one fixed score. Equal
    scores keep the order given. Only scores are used, never the order of an answer.

    Raises SmeltError for a judge whose scores mean something inside one call only (first_token, block_rank), and for an
    answer without a finite score for each passage.

    Differs from the paper: the merge alone; the scores that compare are the judge's business (`self_calibrated`).
    """

    paper: ClassVar = Paper(
        "Self-Calibrated Listwise Reranking with Large Language Models", "arXiv:2411.04602", "global sort of list-view scores"
    )
    compares: ClassVar[bool] = True
    judge: Judge = SelfCalibrated()  # noqa: RUF009 (it is frozen)
    window: Annotated[int, Ge(2)] = 20

    def __post_init__(self) -> None:
        fits(self, self.window)

    def rounds(self, n: int) -> Rounds:
        if not n:
            return []
        windows = [list(range(at, min(n, at + self.window))) for at in range(0, n, self.window)]
        answers = yield windows
        scores = []
        for window, (_, score) in zip(windows, answers, strict=True):
            if score is None or score.shape != (len(window),) or not torch.isfinite(score).all():
                raise SmeltError(f"disjoint_merge: {type(self.judge).__name__} gave no finite score for each of {len(window)} passages")
            scores.append(score.detach().double().cpu())
        return torch.argsort(torch.cat(scores), descending=True, stable=True).tolist()

    def calls(self, n: int) -> int:
        return -(-n // self.window)

    def chain(self, n: int) -> int:
        return min(1, n)

    def exact_top(self, n: int) -> int:
        return n
