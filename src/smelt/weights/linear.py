"""Average the weights of models: uniform and weighted soups, and interpolation between a model and where it started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights._merge import Merge, affine, together

__all__ = ["Linear"]


@dataclass(frozen=True)
class Linear(Merge):
    """theta = sum_i w_i theta_i / sum_i w_i, every tensor alike; the first of the models is the stage's own.

    `weights` has one number for each model, the own first; none: all alike. With models=["base"] and weights
    (1 - a, a) it goes the straight way from a trained model to where it started. Equal models, and weights that pick
    one model, give it back bit for bit. Cost: 2 n FLOPs for each model of n weights, no data; memory two more tensors.

    Only models of one origin lie in one basin: the average of models from two seeds is no model.

    Raises SmeltError for no other model, as many weights as there are not models, and weights that sum to zero or are
    not finite.
    Differs from the paper: no greedy selection by held-out accuracy.
    """

    paper: ClassVar = Paper("Model soups: averaging weights of multiple fine-tuned models", "arXiv:2203.05482", "section 2, uniform soup")
    models: tuple[str, ...] = ("base",)
    weights: tuple[float, ...] = ()  # of the own model and of `models`; none: all alike

    def __post_init__(self) -> None:
        if not self.models:
            raise SmeltError("linear: models is empty; name what to average with, such as models=['base']")
        if self.weights and len(self.weights) != 1 + len(self.models):
            raise SmeltError(f"linear: {len(self.weights)} weights for {1 + len(self.models)} models (the stage's own is the first)")
        if not all(map(math.isfinite, self.weights)) or (self.weights and sum(self.weights) == 0):
            raise SmeltError(f"linear: weights={list(self.weights)}; finite numbers with a sum that is not zero are expected")

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        weights = self.weights or (1.0,) * len(tensors)
        total = math.fsum(weights)
        return affine(together(self, tensors, base), [w / total for w in weights]).to(tensors[0].dtype)
