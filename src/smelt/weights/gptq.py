"""GPTQ: quantize column by column, the weights still to come taking up the error."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights import Budget, Codes, PerMatrix
from smelt.weights._hessian import BLOCK, corrected, inverse_factor
from smelt.weights.rtn import RTN

__all__ = ["GPTQ"]


@dataclass(frozen=True)
class GPTQ(PerMatrix):
    """for each j: W'_ij = s (clamp(round(W_ij / s) + z) - z), then W_i,j+1: -= (W_ij - W'_ij) U_j,j+1: / U_jj.

    U^T U = (H + damp mean(diag H) I)^-1, U upper triangular, H = E x x^T. Scales s and zero points z are those of
    `grid`, fixed before the loop; with `refit` those of each group are taken when its first column is reached, from
    the weights as corrected until then. `act_order` takes the columns by falling H_jj, each keeping its group.
    weight [out, in], hessian [in, in] -> Codes, of as many bits as the grid's. Columns whose input is always 0
    become 0. H = c I gives round to nearest. Cost: one calibration pass, 2 in^3 / 3 + out in^2 FLOPs in float64,
    32 in^2 + 8 out in bytes.

    Raises SmeltError when the grid is not `rtn`, its group does not divide the columns, `damp` is too small to
    invert, and when both `refit` and `act_order` are asked for: then a group has no first column.
    Differs from the paper: the error that is passed on is that of the weight as it will be read back, with the scale
    rounded to 16 bits. `act_order` and `refit` are options of the authors' code rather than of the paper.
    """

    paper: ClassVar = Paper(
        "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", "arXiv:2210.17323", "algorithm 1"
    )
    quantizes: ClassVar[bool] = True
    gentlest: ClassVar[Mapping[str, Any]] = {"grid": RTN(bits=8)}
    grid: Any = field(default_factory=RTN)  # where scales and zero points come from
    act_order: bool = False  # columns by falling mean square of their input
    refit: bool = False  # take each group's scale when the loop reaches it
    damp: Annotated[float, Gt(0)] = 0.01  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self) -> None:
        if not isinstance(self.grid, RTN):
            raise SmeltError(f"gptq: grid is {self.grid!r}; it takes its scales from round to nearest, as grid=rtn(bits=3)")
        if self.act_order and self.refit:
            raise SmeltError("gptq: act_order and refit cannot be combined: sorted columns leave no group together to fit; choose one")

    def __call__(self, weight: Tensor, hessian: Tensor) -> Codes:
        diagonal = hessian.diagonal()
        order = diagonal.argsort(descending=True, stable=True) if self.act_order else torch.arange(len(diagonal), device=hessian.device)
        factor, dead = inverse_factor(hessian[order][:, order] if self.act_order else hessian, self.damp, "gptq")
        used = weight.masked_fill(dead[order.argsort()], 0.0)
        fixed: Codes = self.grid(used)
        scale, group, code = fixed.scale.clone(), fixed.group, torch.zeros_like(fixed.code)
        zero = None if fixed.zero is None else fixed.zero.clone()
        low, high = -(1 << fixed.bits - 1), (1 << fixed.bits - 1) - 1
        position = order.tolist()

        def column(at: int, rest: Tensor) -> Tensor:
            j = position[at]
            g = j // group
            if self.refit and at % group == 0:
                part: Codes = self.grid(rest[:, :group].to(weight.dtype))
                scale[:, g] = part.scale[:, 0]
                if zero is not None and part.zero is not None:
                    zero[:, g] = part.zero[:, 0]
            level = (rest[:, 0].float() / scale[:, g].float()).round()
            shift = torch.zeros_like(level) if zero is None else zero[:, g].to(level.dtype)
            code[:, j] = (level + shift).clamp(low, high).to(torch.int8)
            return (code[:, j].to(scale.dtype) - shift.to(scale.dtype)) * scale[:, g]

        corrected(used[:, order], factor, column, _block(group) if self.refit else BLOCK)
        return dataclasses.replace(fixed, code=code, scale=scale, zero=zero)

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        return self.grid.budget(shapes)


def _block(group: int) -> int:
    """Columns of a block such that every group begins where all earlier corrections have arrived."""
    return BLOCK // group * group if group <= BLOCK else max(d for d in range(1, BLOCK + 1) if group % d == 0)
