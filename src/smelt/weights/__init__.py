"""Prune, quantize, merge, factorize: methods that change the weights of a model and leave a plain checkpoint.

A method is of one of six kinds, told apart by its base class; each says what it measures first by the names of its
call's parameters, and `compress.py` supplies just that from one calibration pass (padding never counts):
    input_rms, input_mean_abs [in]    root mean square, and mean absolute value, of each input channel
    hessian [in, in], tokens: int     mean of x x^T over the calibration tokens, float64, and how many tokens there were
    inputs [n, in]                    the inputs of up to 4,096 tokens, spread evenly over the rows
`PerMatrix`: (weight [out, in], statistics) -> Tensor of the same shape and dtype, `Codes` (quantized), or a `SwappedLinear` that
stands in its place (without bias; the checkpoint then loads in smelt). Called for every linear map inside the blocks, layer
by layer, the inputs coming from the already compressed layers before it; embeddings and head are left alone.
`Scaled`: (weights that read one input, statistics) -> scale of that input; what comes before is divided by it, then `quantizer` is applied.
`_whole.Restructure`: (model, calibration batches {input_ids [b, t], attention_mask [b, t]}) -> another plain model of that architecture.
`_whole.Whole`: (model, Bench) -> model: what no matrix can decide alone, such as a search over levels.
`_adapter.Adapter`: a few new weights that learn in a `train:` block while the model's own stand still.
`_merge.Merge`: (name, that tensor of every model) -> tensor; checkpoints are streamed, nothing is calibrated.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from smelt.model._swap import SwappedLinear

__all__ = ["STATISTICS", "Budget", "Codes", "PerMatrix", "Result", "Scaled"]
STATISTICS = ("input_rms", "input_mean_abs", "hessian", "tokens", "inputs")


@dataclass(frozen=True)
class Codes:
    """A quantized matrix: W'[o, i] = scale[o, g] * (code[o, i] - zero[o, g]), g = i // group, rounded to scale's dtype."""

    code: Tensor  # int8 [out, in]; -2^(bits-1) .. 2^(bits-1)-1
    scale: Tensor  # float16 or bfloat16 [out, in / group], as it is stored
    zero: Tensor | None  # int8 [out, in / group], same range as code; None when symmetric
    bits: int
    group: int  # columns that share a scale

    def dequantize(self) -> Tensor:
        code, scale = self.code.to(self.scale.dtype).unflatten(1, (-1, self.group)), self.scale[..., None]
        return (code * scale if self.zero is None else (code - self.zero.to(scale.dtype)[..., None]) * scale).flatten(1)


Result = Tensor | Codes | SwappedLinear


class Budget(NamedTuple):
    zeros: int = 0  # weights of the matrix set to zero
    bits: float | None = None  # stored bits per weight with scales and zero points; None: the dtype's own
    numbers: int | None = None  # values stored in the matrix's place, by a SwappedLinear; None: out * in


class PerMatrix(ABC):
    """(weight, statistics by name) -> Result. `gentlest` are the field values that compress least."""

    quantizes: ClassVar[bool] = False  # returns Codes
    swaps: ClassVar[bool] = False  # returns a SwappedLinear, whose class is the method's `module`
    gentlest: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def __call__(self, weight: Tensor, *statistics: Any) -> Result: ...

    @abstractmethod
    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        """What each matrix [out, in] comes out as, exactly, reading no weights. Raises SmeltError for shapes that do not fit."""


class Scaled(ABC):
    """([weight [out_i, in]], statistics) -> scale > 0 [in]; each becomes quantizer(W diag(scale)), its input x / scale."""

    gentlest: ClassVar[Mapping[str, Any]]
    quantizer: Any  # a PerMatrix; sees the statistics of the scaled input

    @abstractmethod
    def __call__(self, weights: Sequence[Tensor], *statistics: Any) -> Tensor: ...
