"""Add what models have learned since a common base, or take it away."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights._merge import Merge, affine, together

__all__ = ["TaskArithmetic"]


@dataclass(frozen=True)
class TaskArithmetic(Merge):
    """theta = theta_0 + scale * sum_i w_i (theta_i - theta_0); theta_0 the base, theta_1 the stage's own model.

    Positive weights add a task, negative ones take it away. Without other models it scales the one task vector:
    scale=0 is the base, 1 the model, -1 forgets, each bit for bit where it is one of the given (0 and 1). Computed as
    the affine sum of the models with weights scale * w_i and of the base with what is missing to 1. Cost: 2 n FLOPs
    for each model of n weights, no data; memory two more tensors.

    Raises SmeltError for as many weights as there are not models, and numbers that are not finite.
    Differs from the paper: the scale is given, not chosen on held-out data (the paper's choices lie between 0 and 1).
    """

    paper: ClassVar = Paper("Editing Models with Task Arithmetic", "arXiv:2212.04089", "section 2")
    needs_base: ClassVar[bool] = True
    models: tuple[str, ...] = ()
    base: str = "base"  # what the models were trained from
    scale: float = 1.0
    weights: tuple[float, ...] = ()  # of the own model and of `models`; none: all 1

    def __post_init__(self) -> None:
        if self.weights and len(self.weights) != 1 + len(self.models):
            raise SmeltError(
                f"task_arithmetic: {len(self.weights)} weights for {1 + len(self.models)} models (the stage's own is the first)"
            )
        if not all(map(math.isfinite, (self.scale, *self.weights))):
            raise SmeltError(f"task_arithmetic: scale={self.scale}, weights={list(self.weights)}; finite numbers are expected")

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        weights = [self.scale * w for w in self.weights or (1.0,) * len(tensors)]
        return affine(together(self, tensors, base), [1 - math.fsum(weights), *weights]).to(tensors[0].dtype)
