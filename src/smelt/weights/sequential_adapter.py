"""A small two-layer network behind every feed-forward part; only these are trained (Houlsby, Pfeiffer)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from torch import Tensor, nn

from smelt.model._swap import Swapped
from smelt.model._walk import attention_of, blocks, mlp_of, prefix_of
from smelt.spec import Paper, SmeltError
from smelt.weights._adapter import Adapter, Attached, placed, seeded

__all__ = ["SequentialAdapter"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
Activation = Literal["relu", "gelu", "silu"]


class Bottleneck(Swapped):
    """Stands for the linear map that ends a part of a block: y = W x, then y + up(f(down(norm(y)))). `up` starts at zero."""

    owner: ClassVar[str] = "weights.sequential_adapter"

    def __init__(self, inner: nn.Linear, reduction: int, activation: str):
        super().__init__()
        size = inner.out_features
        if size < reduction:
            raise SmeltError(f"sequential_adapter: reduction={reduction} leaves nothing of {size} channels")
        about: dict[str, Any] = {"device": inner.weight.device, "dtype": inner.weight.dtype}
        self.inner, self.reduction, self.activation = inner, reduction, activation
        self.norm = nn.LayerNorm(size, **about)
        self.down = nn.Linear(size, size // reduction, bias=False, **about)
        self.up = nn.Linear(size // reduction, size, bias=False, **about)
        nn.init.zeros_(self.up.weight)
        self.f = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.up(self.f(self.down(self.norm(y))))

    def settings(self) -> dict[str, Any]:
        return {"reduction": self.reduction, "activation": self.activation}

    @classmethod
    def build(cls, was: nn.Module, **settings: Any) -> Self:
        reduction, activation = settings.get("reduction"), settings.get("activation")
        if not isinstance(was, nn.Linear):
            raise SmeltError(f"sequential_adapter stands for a linear map, not for a {type(was).__name__}")
        if type(reduction) is not int or reduction < 1 or activation not in ACTIVATIONS or len(settings) != 2:
            raise SmeltError(f"sequential_adapter: its settings are a reduction and an activation, not {settings}")
        return cls(was, reduction, str(activation))


@dataclass(frozen=True)
class SequentialAdapter(Adapter):
    """h <- h + W_up f(W_down LN(h)), W_down [d // reduction, d] drawn, W_up [d, d // reduction] = 0, all else standing still.

    h [.., d] is what the feed-forward part of a block gives (`where="ffn"`), or also what its attention gives ("both"),
    before it is added to the stream. Trained: 2 d (d // reduction) + 2 d weights at each place (the norm has 2 d). The model is
    slower by 2 of these weights' FLOPs per token. It cannot be merged: the checkpoint has modules of its own and loads in smelt.

    Raises SmeltError for blocks whose parts do not end in plain linear maps `down_proj` and `o_proj`, for a model that has
    such adapters already, and for a reduction larger than d.
    Differs from the paper: LN stands before W_down and there are no biases; Houlsby et al. put it after both parts, which
    is `where="both"`; Pfeiffer et al. (arXiv:2005.00247) after the feed-forward part only. Set for encoders there,
    which normalize after a part; decoders here normalize before it.
    """

    paper: ClassVar = Paper("Parameter-Efficient Transfer Learning for NLP", "arXiv:1902.00751", "section 2.1")
    module: ClassVar = Bottleneck
    reduction: Annotated[int, Ge(1)] = 16
    where: Literal["ffn", "both"] = "ffn"
    activation: Activation = "relu"

    def parameters(self, model: Any) -> int:
        sizes = [module.out_features for _, module in self._places(model)]
        return sum(2 * size * (size // self.reduction) + 2 * size for size in sizes)

    def _places(self, model: Any) -> Iterator[tuple[str, nn.Linear]]:
        prefix = prefix_of(model)
        for index, block in enumerate(blocks(model)):
            ends = [getattr(mlp_of(block), "down_proj", None)]
            ends += [getattr(attention_of(block), "o_proj", None)] * (self.where == "both")
            names = {id(module): name for name, module in block.named_modules()}
            for end in ends:
                if isinstance(end, Bottleneck):
                    raise SmeltError("sequential_adapter: this model has such adapters already; go on training without 'adapter'")
                if not isinstance(end, nn.Linear):
                    raise SmeltError(f"{type(block).__name__}: its parts do not end in linear maps down_proj and o_proj; take lora()")
                yield f"{prefix}{index}.{names[id(end)]}", end

    def attach(self, model: Any, seed: int) -> Attached:
        with seeded(seed):
            made = {name: Bottleneck(module, self.reduction, self.activation) for name, module in self._places(model)}
        return placed(model, made)
