"""Wanda: magnitude pruning that looks at how large each input is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from smelt.spec import Paper
from smelt.weights import Budget, PerMatrix
from smelt.weights._hessian import check_pattern, lowest_of_groups, pattern_zeros

__all__ = ["Wanda"]


@dataclass(frozen=True)
class Wanda(PerMatrix):
    """W'_ij = 0 for the round(sparsity * in) smallest |W_ij| rms(x_j) of each output row, else W_ij.

    weight [out, in], input_rms [in] -> [out, in]. The number of zeros is exact (ties are broken by position). With
    n and m, n of every m neighbouring columns are kept in each row, as n=2, m=4, and sparsity is 1 - n / m.
    Multiplying an input channel by a factor and dividing its column by it changes nothing: neither do outlier
    channels. No weight that stays is changed. Cost: one calibration pass and one sort, O(out in log in).

    Raises SmeltError where m does not divide the columns, and where n, m and sparsity contradict each other.
    Differs from the paper: the root mean square instead of the L2 norm over all tokens, the same order in every row.
    """

    paper: ClassVar = Paper(
        "A Simple and Effective Pruning Approach for Large Language Models", "arXiv:2306.11695", "section 3, equation 1"
    )
    gentlest: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}
    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5  # fraction of the weights set to zero
    n: Annotated[int, Ge(0)] = 0  # weights kept of every m; 0: no pattern
    m: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        check_pattern("wanda", self.n, self.m, self.sparsity)

    def __call__(self, weight: Tensor, input_rms: Tensor) -> Tensor:
        count = self._zeros(weight.shape[1])
        score = weight.abs().float() * input_rms.float()
        if self.m:
            return weight.masked_fill(lowest_of_groups(score, self.n, self.m), 0.0)
        lowest = score.argsort(dim=1, stable=True)[:, :count]
        return weight.masked_fill(torch.zeros_like(weight, dtype=torch.bool).scatter(1, lowest, True), 0.0)

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        return [Budget(zeros=out * self._zeros(columns)) for out, columns in shapes]

    def _zeros(self, columns: int) -> int:
        """Of one row."""
        return pattern_zeros("wanda", self.n, self.m, columns) if self.m else round(self.sparsity * columns)
