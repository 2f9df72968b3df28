"""AWQ: give the input channels that are large more of the quantization grid, without changing the function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights import Scaled
from smelt.weights._hessian import output_error
from smelt.weights.gptq import GPTQ
from smelt.weights.rtn import RTN

__all__ = ["AWQ"]


@dataclass(frozen=True)
class AWQ(Scaled):
    """W' = Q(W diag(s)) diag(1/s), s = t / sqrt(max t min t), t_j = (mean |x_j|)^a, a = argmin_a tr((W - W') H (W - W')^T).

    a is one of 0, 1/steps, ... (steps - 1)/steps, for all the matrices that read one input together: q, k and v; gate
    and up; down; and o where every query head has its own value head. 1/s goes into the norm, or the rows of the
    map, before them, so the model keeps its modules and runs no slower; other matrices are quantized as they are.
    [weight [out_i, in]], input_mean_abs [in], hessian [in, in] -> s [in]. steps=1 leaves the quantizer alone. Channels
    below 1e-4 of the largest count as that. With quantizer=gptq() the powers are chosen with its grid, and it then
    sees the Hessian of the scaled input. Cost: one calibration pass and `steps` quantizations of every matrix, each
    2 out in^2 FLOPs in float32 to weigh.

    Raises SmeltError for quantizers other than rtn and gptq, and for blocks that are no gated decoder blocks with norms.
    Differs from the paper: the error is that of the matrices themselves, not of the attention or mlp they are in;
    no search for clipped ranges after it (the authors' code has one).
    """

    paper: ClassVar = Paper(
        "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", "arXiv:2306.00978", "section 3.2"
    )
    quantizes: ClassVar[bool] = True
    gentlest: ClassVar[Mapping[str, Any]] = {"steps": 1, "quantizer": RTN(bits=8)}
    steps: Annotated[int, Ge(1)] = 20  # powers tried
    quantizer: Any = field(default_factory=RTN)  # rtn or gptq

    def __post_init__(self) -> None:
        if not isinstance(self.quantizer, (RTN, GPTQ)):
            raise SmeltError(f"awq: quantizer is {self.quantizer!r}; it scales for rtn(...) or gptq(...)")

    def __call__(self, weights: Sequence[Tensor], input_mean_abs: Tensor, hessian: Tensor) -> Tensor:
        grid = self.quantizer.grid if isinstance(self.quantizer, GPTQ) else self.quantizer
        exact = hessian.float()
        size = input_mean_abs.float()
        size = (size / size.max()).clamp(min=1e-4) if size.any() else torch.ones_like(size)  # s is the same for c x
        best, least = torch.ones_like(size), float("inf")
        for step in range(self.steps):
            power = size ** (step / self.steps)
            scale = power / (power.max() * power.min()).sqrt()
            error = 0.0
            for weight in weights:
                made = grid((weight.float() * scale).to(weight.dtype)).dequantize().float() / scale
                error += output_error(weight, made, exact).item()
            if error < least:
                best, least = scale, error
        return best
