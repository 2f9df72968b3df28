"""Based: softmax's second-order Taylor series as linear attention, in the place of some or all attention layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge
from torch import Tensor, nn

from smelt.attention._linear import apart, kept, linear, new, state_bytes, taylor, together
from smelt.attention._mixer import Converting, MixerModule, State
from smelt.spec import Paper

__all__ = ["Based"]


class _Mixer(MixerModule):
    owner: ClassVar[str] = "attention.based"

    def __init__(self, was: Any, width: int):
        super().__init__(was)
        self.v_proj, self.o_proj = kept(was, "based", "v_proj", "o_proj")
        self.width, self.heads = width, self.o_proj.in_features // was.head_dim
        self.groups = self.v_proj.out_features // was.head_dim
        self.q_proj = new(self.v_proj.in_features, self.heads * width, self.v_proj.weight)
        self.k_proj = new(self.v_proj.in_features, self.groups * width, self.v_proj.weight)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width}

    @classmethod
    def build(cls, was: Any, *args: Any, **settings: Any) -> Self:
        return cls(was, **settings)

    def mix(self, hidden: Tensor, angles: tuple[Tensor, Tensor], state: State | None, real: Tensor | None) -> Tensor:
        query, key = apart(self.q_proj(hidden), self.heads), apart(self.k_proj(hidden), self.groups)
        sums = None if state is None else state.held.get("sums")
        out, sums = linear(query, key, apart(self.v_proj(hidden), self.groups), sums=sums, real=real, divide=True, features=taylor)
        if state is not None:
            state.held = {"sums": sums}
        return self.o_proj(together(out))


@dataclass(frozen=True)
class Based(Converting):
    """o_i = sum_(j <= i) w_ij v_j / sum_(j <= i) w_ij, w_ij = phi(q_i) phi(k_j) = 1 + s + s^2 / 2, s = q_i k_j / sqrt(f).

    hidden [b, t, D] -> [b, t, D]; q [b, h, t, f], k [b, g, t, f] from new maps W_q [h f, D], W_k [g f, D] without bias, drawn as
    nn.Linear draws; v [b, g, t, d] and the output map are the model's own parameters. f = `width`; phi has the symmetric
    F = 1 + f + f (f + 1) / 2 features (153 for 16), w >= 1/2. These layers know no positions: no rotary angles. h query and g
    key/value heads as in the model, h / g query heads share a state. The layers not in `layers` stay softmax: a few of
    them (in the paper a fifth, with windows of 64) give the model its positions and exact local words.

    State: S [F, d] and z [F] of each key/value head, float32 whatever the model's: 4 b g F (d + 1) bytes a layer for any
    text; as many bytes as a float32 KV cache of F (d + 1) / (2 d) tokens. FLOPs of a token in decode: about 2 (h + g) F (d + 1).
    The model needs training after it (a distill stage): the new maps are random. Raises SmeltError for attention
    without separate linear maps v_proj and o_proj, and for layers the model does not have.

    Differs from the paper: symmetric features, which give the same kernel for 153 instead of 273 rows of state; key heads
    as few as value heads, where the paper has no grouped heads; no short convolutions, and sliding windows only
    where the model's own layers have them.
    """

    paper: ClassVar = Paper(
        "Simple linear attention language models balance the recall-throughput tradeoff", "arXiv:2402.18668", "Taylor linear attention"
    )
    module: ClassVar[type[MixerModule]] = _Mixer
    width: Annotated[int, Ge(1)] = 16  # f, of queries and keys
    layers: tuple[int, ...] | None = None

    def mixer(self, was: nn.Module, config: Any) -> MixerModule:
        made = _Mixer(was, self.width)
        made.q_proj.reset_parameters()
        made.k_proj.reset_parameters()
        return made

    def state_bytes(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 4) -> int:
        return state_bytes(config, self.width, self.layers, batch)

    @classmethod
    def example(cls) -> Self:
        return cls(width=6)
