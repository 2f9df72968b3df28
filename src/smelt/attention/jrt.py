"""JRT-RNN: prefix-linear attention. The first tokens of a text see each other both ways, and the rest remembers them better."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge
from torch import Tensor, nn

from smelt.attention._linear import apart, kept, linear, new, state_bytes, taylor, together, total
from smelt.attention._mixer import Converting, MixerModule, State
from smelt.spec import Paper

__all__ = ["Jrt"]


class _Mixer(MixerModule):
    owner: ClassVar[str] = "attention.jrt"

    def __init__(self, was: Any, width: int, prefix: int):
        super().__init__(was)
        self.v_proj, self.o_proj = kept(was, "jrt", "v_proj", "o_proj")
        self.width, self.prefix, self.heads = width, prefix, self.o_proj.in_features // was.head_dim
        self.groups = self.v_proj.out_features // was.head_dim
        self.q_proj = new(self.v_proj.in_features, self.heads * width, self.v_proj.weight)
        self.k_proj = new(self.v_proj.in_features, self.groups * width, self.v_proj.weight)
        self.encoder_k_proj = new(self.v_proj.in_features, self.groups * width, self.v_proj.weight)
        self.encoder_v_proj = copy.deepcopy(self.v_proj)

    def settings(self) -> dict[str, Any]:
        return {"width": self.width, "prefix": self.prefix}

    @classmethod
    def build(cls, was: Any, *args: Any, **settings: Any) -> Self:
        return cls(was, **settings)

    def mix(self, hidden: Tensor, angles: tuple[Tensor, Tensor], state: State | None, real: Tensor | None) -> Tensor:
        sums = state.held["sums"] if state is not None and state.held else self._encoded(hidden, real)
        query, key = apart(self.q_proj(hidden), self.heads), apart(self.k_proj(hidden), self.groups)
        out, sums = linear(query, key, apart(self.v_proj(hidden), self.groups), sums=sums, real=real, divide=True, features=taylor)
        if state is not None:
            state.held = {"sums": sums}
        return self.o_proj(together(out))

    def _encoded(self, hidden: Tensor, real: Tensor | None) -> Tensor:
        """The encoder's sums over the prefix, from which the causal ones start: every token then sees all of it."""
        if real is None:
            hidden = hidden[:, : self.prefix]
        else:
            real = real & (real.cumsum(1) <= self.prefix)
        key, value = apart(self.encoder_k_proj(hidden), self.groups), apart(self.encoder_v_proj(hidden), self.groups)
        return total(key, value, taylor, real)


@dataclass(frozen=True)
class Jrt(Converting):
    """o_i = (sum_(j<=i) w(q_i, k_j) v_j + sum_(j<=M) w(q_i, e_j) u_j) / (sum_(j<=i) w(q_i, k_j) + sum_(j<=M) w(q_i, e_j)).

    w, f, q, k, v and the output map are those of `based` (w = 1 + s + s^2 / 2, no rotary angles); e [b, g, t, f] and u [b, g, t, d]
    are the encoder's keys and values from new maps. New: W_q [h f, D], W_k and W_e [g f, D], drawn as nn.Linear draws, and W_u, a
    copy of the model's W_v. The causal sum runs over the prefix as well, so its tokens count twice.

    The prefix is the first M = `prefix` real tokens (padding is not counted) of the call that begins the text: of the whole text
    without a cache, of the first piece with one. Each of them reads all of them, whatever their order, and so does all that
    follows. A prompt shorter than M is a prefix as it is (the paper pads it to M), and what is written after it is causal.
    Three things follow. Logits before the prefix's last token depend on the tokens after them: no next-token loss and no
    probability may be read there. Fed in pieces, a text comes out the same only if the first piece holds the prefix. A
    prompt shorter than M has to be continued with the cache: read again without one it would have grown into its prefix.

    State: the encoder's sums are where the causal ones start, so it is that of `based`, 4 b g F (d + 1) bytes a layer, F = 1 + f +
    f (f + 1) / 2. FLOPs: those of `based`, and 2 g F (d + 1) more for each token of the prefix. Training follows in a distill
    stage. Raises SmeltError as `based` does.

    Differs from the paper: no masked-token loss on the prefix (0.25 L_MLM there), so the prefix learns from what is asked after
    it; its mixture with short convolutions and windows of 256 is `layers`; W_u starts as W_v and not at random.
    """

    paper: ClassVar = Paper(
        "Just read twice: closing the recall gap for recurrent language models", "arXiv:2407.05483", "JRT-RNN, prefix-linear attention"
    )
    module: ClassVar[type[MixerModule]] = _Mixer
    width: Annotated[int, Ge(1)] = 16  # f, of queries and keys
    prefix: Annotated[int, Ge(1)] = 1024  # M, tokens
    layers: tuple[int, ...] | None = None

    def mixer(self, was: nn.Module, config: Any) -> MixerModule:
        made = _Mixer(was, self.width, self.prefix)
        for fresh in (made.q_proj, made.k_proj, made.encoder_k_proj):
            fresh.reset_parameters()
        return made

    def state_bytes(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 4) -> int:
        return state_bytes(config, self.width, self.layers, batch)

    @classmethod
    def example(cls) -> Self:
        return cls(width=6, prefix=16)
