"""SparseGPT: prune column by column, the weights still to come taking up the error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor

from smelt.spec import Paper
from smelt.weights import Budget, PerMatrix
from smelt.weights._hessian import BLOCK, check_pattern, corrected, inverse_factor, lowest_of_groups, pattern_zeros

__all__ = ["SparseGPT"]


@dataclass(frozen=True)
class SparseGPT(PerMatrix):
    """for each j: W'_ij = 0 where W_ij^2 / U_jj^2 is lowest, then W_i,j+1: -= (W_ij - W'_ij) U_j,j+1: / U_jj.

    U^T U = (H + damp mean(diag H) I)^-1, U upper triangular, H = E x x^T. The mask of each block of 128 columns is
    chosen over all its rows when the block is reached, from the weights as corrected until then; with n and m, n of
    every m neighbouring columns are kept in each row, chosen when the first of them is reached.
    weight [out, in], hessian [in, in] -> [out, in]. The number of zeros is exact; columns whose input is always 0 go
    first. Cost: one calibration pass, 2 in^3 / 3 + out in^2 FLOPs in float64, 32 in^2 + 8 out in bytes.

    Raises SmeltError where m does not divide the columns, where n, m and sparsity contradict each other, and where
    `damp` is too small to invert.
    Differs from the paper: the columns of inputs that are always 0 are not zeroed beyond the sparsity asked for.
    """

    paper: ClassVar = Paper(
        "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", "arXiv:2301.00774", "section 3, algorithm 1"
    )
    gentlest: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}
    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5  # fraction of the weights set to zero
    n: Annotated[int, Ge(0)] = 0  # weights kept of every m; 0: no pattern
    m: Annotated[int, Ge(0)] = 0
    damp: Annotated[float, Gt(0)] = 0.01  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self) -> None:
        check_pattern("sparsegpt", self.n, self.m, self.sparsity)

    def __call__(self, weight: Tensor, hessian: Tensor) -> Tensor:
        self._zeros(*weight.shape)
        factor, dead = inverse_factor(hessian, self.damp, "sparsegpt")
        cost = factor.diagonal().square()
        mask = torch.zeros_like(weight, dtype=torch.bool)
        block = max(self.m, BLOCK - BLOCK % self.m) if self.m else BLOCK
        step = self.m or block

        def column(at: int, rest: Tensor) -> Tensor:
            if at % step == 0:
                part = slice(at, at + step)
                score = (rest[:, :step].square() / cost[part]).masked_fill(dead[part], -1.0)
                mask[:, part] = lowest_of_groups(score, self.n, self.m) if self.m else self._lowest(score, at)
            return rest[:, 0].masked_fill(mask[:, at], 0.0)

        return corrected(weight, factor, column, block).to(weight.dtype)

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        return [Budget(zeros=self._zeros(*shape)) for shape in shapes]

    def _zeros(self, out: int, columns: int) -> int:
        return out * pattern_zeros("sparsegpt", self.n, self.m, columns) if self.m else round(self.sparsity * out * columns)

    def _lowest(self, score: Tensor, start: int) -> Tensor:
        """The block's share of the zeros; shares are differences of rounded sums, so they add up to the whole."""
        out, width = score.shape
        count = round(self.sparsity * out * (start + width)) - round(self.sparsity * out * start)
        lowest = score.flatten().argsort(stable=True)[:count]
        return torch.zeros(out * width, dtype=torch.bool, device=score.device).scatter(0, lowest, True).view(out, width)
