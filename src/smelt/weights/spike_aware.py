"""Keep the few maps whose inputs spike as they are, and quantize everything else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from smelt.model._swap import SwappedLinear
from smelt.spec import Paper, SmeltError, nearest
from smelt.weights import Codes, PerMatrix
from smelt.weights._formats import packed_bytes
from smelt.weights._whole import Bench, Whole
from smelt.weights.rtn import RTN

__all__ = ["SpikeAware"]


class StaticInput(SwappedLinear):
    """W q(x), q(x) = s clamp(round(x / s), -m, m), m = 2^(bits-1) - 1: one scale s for all tokens and channels, fixed beforehand.

    The gradient passes q as if it were the identity. The product is made in x's dtype: what is measured is the error of
    integer inputs, not their speed.
    """

    owner: ClassVar[str] = "weights.spike_aware"

    def __init__(self, weight: Tensor, bits: int, scale: float, bias: nn.Parameter | None = None):
        super().__init__(weight.shape[1], weight.shape[0], bias)
        self.weight, self.bits, self.scale = nn.Parameter(weight), bits, scale

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "scale": self.scale}

    @classmethod
    def build(cls, was: nn.Module, **settings: Any) -> Self:
        assert isinstance(was, nn.Linear)
        return cls(torch.empty_like(was.weight), bias=was.bias, **settings)

    def product(self, x: Tensor) -> Tensor:
        most = 2 ** (self.bits - 1) - 1
        made = ((x.float() / self.scale).round().clamp(-most, most) * self.scale).to(x.dtype)
        return nn.functional.linear(x + (made - x).detach() if x.requires_grad else made, self.weight)

    def dense(self) -> Tensor:
        return self.weight.data


@dataclass(frozen=True)
class SpikeAware(Whole):
    """W'_m = W_m for the maps m with the largest r_m = max|x| / median|x| of their inputs, quantizer(W_m) for the others.

    With `keep` the first so many maps by r are kept, ties in the order of the model; with `above` all of r >= above; with neither,
    none, which is the baseline. `among` is the end of the names that may be kept, as "o_proj" (a control: what does
    another choice recover?). With activations=b the input of every map that is not kept is rounded to b bits as well:
    symmetric, one scale max|x| / (2^(b-1) - 1) for the whole tensor, fixed from the calibration rows. A kept map keeps its input too.

    max and median run over the tokens of the statistic `inputs`, padding not counted: all of up to 4,096 tokens, and a
    sample of more. A spike sits on a token or two of a row (the first, a delimiter), so calibrate on at most 4,096, with the
    first token that the model will be used with. Scales per token would hide the effect: each spike then spoils its own token only.
    The report has "ratios" of all maps, "kept", "extra_bytes" (kept as they are, beyond what they would take quantized), and
    "packed_bits_per_weight": with `activations` the checkpoint is stored dense and loads in smelt only, as transformers has
    no such module; without, it loads anywhere. Cost: one calibration pass (one more where the quantizer measures) and a sort
    of 4,096 in values per map.

    Measured on the embedded model (16 calibration rows of 256, 8-bit weights, nats per token on 32 held-out rows, one seed): the
    ratios of the eight down_proj are 368 to 828, of all other maps at most 17. Dense 3.1235; inputs in 8 bits 3.1299, 6 bits
    3.2029, 5 bits 3.3415, 4 bits 3.9808. At 6 bits keep=8 finds down_proj: 3.1279, 94 % of the loss recovered, at 13.9
    instead of 8.2 bits per weight; keeping the eight o_proj (3.2115) or gate_proj (3.2075) recovers nothing.

    Raises SmeltError when `keep` and `above` are both given, when fewer maps than `keep` have such a name, when none has,
    and for quantizers that leave no codes. Keeping all maps changes nothing, which `compress` refuses.
    Differs from the paper: the maps are found from the calibration rows, where the paper lists them for each model; kept
    maps are never FP8; which ratio it uses is not in our sources (reconstruction).
    """

    paper: ClassVar = Paper(
        "Precision Where It Matters: A Novel Spike Aware Mixed-Precision Quantization Strategy for LLaMA-based Language Models",
        "arXiv:2504.21553",
    )
    module: ClassVar = StaticInput
    gentlest: ClassVar[Mapping[str, Any]] = {"keep": 0, "above": 1.0}
    quantizer: Any = field(default_factory=RTN)  # of the maps that are not kept
    keep: Annotated[int, Ge(0)] = 4  # maps
    above: Annotated[float, Ge(0)] = 0.0  # ratio; 0: count by `keep`
    activations: Annotated[int, Interval(ge=0, le=8)] = 0  # bits of the inputs of quantized maps; 0: as they are
    among: str = ""  # only maps whose name ends so may be kept

    def __post_init__(self) -> None:
        if not (isinstance(self.quantizer, PerMatrix) and self.quantizer.quantizes and not self.quantizer.swaps):
            raise SmeltError(f"spike_aware: quantizer is {self.quantizer!r}; it needs one that quantizes each matrix, as rtn(bits=4)")
        if self.keep and self.above:
            raise SmeltError(f"spike_aware: keep={self.keep} and above={self.above:g}; give one, the other 0")
        if self.activations == 1:
            raise SmeltError("spike_aware: activations=1 leaves only zeros; the nearest that works is activations=2")

    @property
    def quantizes(self) -> bool:
        """Whether the checkpoint comes out packed, so that it can be neither trained nor compressed again."""
        return not self.activations

    @classmethod
    def example(cls) -> SpikeAware:
        return cls(quantizer=RTN(bits=4, group=64), keep=2, activations=6)

    def __call__(self, model: Any, bench: Bench) -> Any:
        made: dict[str, Any] = {name: found[0] for name, found in bench.results([self.quantizer]).items()}  # Codes
        peak: dict[str, float] = {}
        ratio: dict[str, float] = {}
        held: dict[str, int] = {}
        weights, dtype = 0, torch.float32
        for name, linear, given in bench.statistics(("inputs",)):
            peak[name], ratio[name] = _spike(given["inputs"])
            held[name], dtype = linear.weight.nbytes, linear.weight.dtype
            weights += linear.weight.numel()
        kept = self._kept(ratio)
        quantized = {name: packed_bytes(codes) for name, codes in made.items()}
        stored = sum(held[name] if name in kept else size for name, size in quantized.items())
        bench.report.update(
            ratios=dict(sorted(ratio.items(), key=lambda item: -item[1])),
            kept=kept,
            extra_bytes=sum(held[name] - quantized[name] for name in kept),
            packed_bits_per_weight=8 * stored / weights,
        )
        for name, codes in made.items():
            if name not in kept:
                bench.put(name, self._with_input(codes, peak[name], dtype) if self.activations else codes)
        return model

    def _kept(self, ratio: Mapping[str, float]) -> list[str]:
        may = [name for name in ratio if name.endswith(self.among)]
        if not may:
            ends = {name.rpartition(".")[2] for name in ratio}
            raise SmeltError(f"spike_aware: no map's name ends in '{self.among}'{nearest(self.among, ends)}")
        if self.keep > len(may):
            raise SmeltError(f"spike_aware: keep={self.keep} is more than the {len(may)} maps there are; the most is keep={len(may)}")
        if self.above:
            return [name for name in may if ratio[name] >= self.above]
        return sorted(may, key=lambda name: -ratio[name])[: self.keep]

    def _with_input(self, codes: Codes, peak: float, dtype: torch.dtype) -> StaticInput:
        scale = max(peak, torch.finfo(torch.float32).tiny) / (2 ** (self.activations - 1) - 1)
        return StaticInput(codes.dequantize().to(dtype), self.activations, scale)


def _spike(x: Tensor) -> tuple[float, float]:
    """(max|x|, max|x| / median|x|) over all values; an input that is always 0 has no spike, ratio 1."""
    size = x.abs().float().flatten()
    peak, middle = size.max().item(), size.median().item()
    return peak, peak / max(middle, torch.finfo(torch.float32).tiny) if peak else 1.0
