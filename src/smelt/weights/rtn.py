"""Round to nearest: the baseline every other quantization method is measured against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights import Budget, Codes, PerMatrix
from smelt.weights._formats import group_of, storage

__all__ = ["RTN"]


@dataclass(frozen=True)
class RTN(PerMatrix):
    """q = clamp(round(W / s) + z, -2^(b-1), 2^(b-1) - 1), W' = s (q - z); one s and z per row and `group` columns.

    asymmetric: s = (max(W, 0) - min(W, 0)) / (2^b - 1), z = round(-2^(b-1) - min(W, 0) / s)
    symmetric:  s = max|W| / (2^(b-1) - 1),              z = 0

    weight [out, in] -> Codes. Bits per weight: b + 16 / group, and b / group more when asymmetric. s is rounded to
    the dtype it is stored in (float16, bfloat16 for bfloat16 weights) before W is, so the saved checkpoint
    dequantizes to exactly the matrix measured here; steps below 2^-24, the smallest float16, become 2^-24.
    Cost: three passes over the weights, no calibration.

    Raises SmeltError when `group` does not divide the columns, or a scale does not fit float16.
    Differs from the paper: min-max grids only, no learned clipping; embeddings and head stay as they are.
    """

    paper: ClassVar = Paper("A White Paper on Neural Network Quantization", "arXiv:2106.08295", "section 2.2, equations 4 to 9")
    quantizes: ClassVar[bool] = True
    gentlest: ClassVar[Mapping[str, Any]] = {"bits": 8}
    bits: Annotated[int, Interval(ge=2, le=8)] = 4
    group: Annotated[int, Ge(-1)] = 128  # columns that share a scale; 0 or -1: the whole row
    symmetric: bool = False  # no zero point

    def __call__(self, weight: Tensor) -> Codes:
        group = group_of(self.group, [weight.shape[1]], "rtn")[0]
        low, high = -(1 << self.bits - 1), (1 << self.bits - 1) - 1
        parted = weight.float().unflatten(1, (-1, group))  # [out, groups, group]
        top, bottom = parted.amax(2).clamp(min=0), parted.amin(2).clamp(max=0)
        span = torch.maximum(top, -bottom) / high if self.symmetric else (top - bottom) / (high - low)
        dtype = storage(weight.dtype)
        scale = span.to(dtype)
        if not torch.isfinite(scale).all():
            raise SmeltError(f"rtn: weights up to {weight.abs().max().item():.3g} need a scale beyond {dtype}")
        scale = scale.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)  # all-zero groups
        step = scale.float()
        code = (parted / step[..., None]).round()
        zero = None
        if not self.symmetric:
            zero = (low - bottom / step).round().clamp(low, high)
            code = code + zero[..., None]
        code = code.clamp(low, high).flatten(1).to(torch.int8)
        return Codes(code, scale, None if zero is None else zero.to(torch.int8), self.bits, group)

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        groups = group_of(self.group, [columns for _, columns in shapes], "rtn")
        shared = 16 + (0 if self.symmetric else self.bits)
        return [Budget(bits=self.bits + shared / group) for group in groups]
