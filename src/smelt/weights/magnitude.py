"""Magnitude pruning, the baseline every other pruning method is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Interval
from torch import Tensor

from smelt.spec import Paper
from smelt.weights import Budget, PerMatrix

__all__ = ["Magnitude"]


@dataclass(frozen=True)
class Magnitude(PerMatrix):
    """W'_ij = 0 for the round(sparsity * n) smallest |W_ij| of each output row (or of the matrix), else W_ij.

    weight [out, in] -> [out, in], n = in per row or out * in per matrix; the number of zeros is exact (ties are
    broken by position). Needs no calibration. Cost: one sort of the weights, O(out in log in); no bytes are saved
    in a dense checkpoint, so what is gained is what a later step makes of the zeros.

    Differs from the paper: one shot, without retraining between rounds; train after it with a `distill` stage.
    """

    paper: ClassVar = Paper("Learning both Weights and Connections", "arXiv:1506.02626", "section 3, one round")
    gentlest: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0}
    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5  # fraction of the weights set to zero
    over: Literal["row", "matrix"] = "row"  # what the smallest are chosen among

    def __call__(self, weight: Tensor) -> Tensor:
        pool = weight if self.over == "row" else weight.reshape(1, -1)
        order = pool.abs().argsort(dim=1, stable=True)
        lowest = order[:, : round(self.sparsity * pool.shape[1])]
        return pool.scatter(1, lowest, 0.0).view_as(weight)

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        rows = [(out, columns) if self.over == "row" else (1, out * columns) for out, columns in shapes]
        return [Budget(zeros=count * round(self.sparsity * n)) for count, n in rows]
