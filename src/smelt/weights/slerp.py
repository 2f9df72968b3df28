"""Interpolate between two models along the great circle, which keeps the length of every tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights._merge import Merge, affine, together, wide

__all__ = ["Slerp"]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Slerp(Merge):
    """theta = sin((1 - t) O) / sin(O) theta_1 + sin(t O) / sin(O) theta_2, O the angle between the two as flat vectors.

    Tensor by tensor; theta_1 is the stage's own model. Straight (1 - t) theta_1 + t theta_2 instead where |cos O| > 0.9995
    (sin(O) vanishes), for tensors of one dimension (norms and biases, whose length is no property of a direction) and
    for zeros. t = 0 and t = 1 return a model bit for bit, equal models return themselves. Two tensors of one length give
    one of that length. Cost: 6 n FLOPs on n weights, sums of the angle in float64; no data.

    Two students of one short training are nearly parallel: there slerp and linear are the same.

    Raises SmeltError unless there is exactly one other model.
    Differs from the paper: Shoemake interpolates unit quaternions; on tensors of two lengths the length of the result
    is not that of a path at constant speed, as in the common use for models. One t for all layers.
    """

    paper: ClassVar = Paper("Animating rotation with quaternion curves", "doi:10.1145/325334.325242", "section 3.3, Slerp")
    models: tuple[str, ...] = ("base",)
    t: Annotated[float, Interval(ge=0, le=1)] = 0.5  # 0: the stage's own model, 1: the other

    def __post_init__(self) -> None:
        if len(self.models) != 1:
            raise SmeltError(f"slerp: it goes from the stage's own model to one other; models={list(self.models)} names {len(self.models)}")

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        a, b = together(self, tensors, base)
        cosine = _cosine(a, b) if a.dim() > 1 else 1.0
        if abs(cosine) > 0.9995:
            return affine([a, b], [1 - self.t, self.t]).to(a.dtype)
        angle = math.acos(cosine)
        ours, theirs = (math.sin(part * angle) / math.sin(angle) for part in (1 - self.t, self.t))
        return (wide(a) * ours).add_(wide(b), alpha=theirs).to(a.dtype)


def _cosine(a: Tensor, b: Tensor) -> float:
    """In float64, a chunk at a time; 1 where one of them is zero."""
    ab = aa = bb = 0.0
    for x, y in zip(a.flatten().split(CHUNK), b.flatten().split(CHUNK), strict=True):
        x, y = x.double(), y.double()
        ab, aa, bb = ab + torch.dot(x, y).item(), aa + torch.dot(x, x).item(), bb + torch.dot(y, y).item()
    return ab / math.sqrt(aa) / math.sqrt(bb) if aa > 0 and bb > 0 else 1.0
