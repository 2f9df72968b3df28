"""Lightning attention of TransNormerLLM: linear attention that forgets at a fixed rate, a norm in the place of the denominator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.attention._linear import apart, kept, linear, new, together
from smelt.attention._mixer import Converting, MixerModule, State
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["Lightning"]


class _Mixer(MixerModule):
    owner: ClassVar[str] = "attention.lightning"

    def __init__(self, was: Any, slopes: list[float], gate: bool, rotary: bool):
        super().__init__(was)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = kept(was, "lightning", "q_proj", "k_proj", "v_proj", "o_proj")
        self.slopes, self.rotary = slopes, rotary
        self.heads, self.groups = self.o_proj.in_features // was.head_dim, self.v_proj.out_features // was.head_dim
        if len(slopes) != self.heads:
            raise SmeltError(f"attention: lightning has {len(slopes)} slopes for {self.heads} heads")
        self.gate = new(self.q_proj.in_features, self.o_proj.in_features, self.q_proj.weight) if gate else None

    def settings(self) -> dict[str, Any]:
        return {"slopes": self.slopes, "gate": self.gate is not None, "rotary": self.rotary}

    @classmethod
    def build(cls, was: Any, *args: Any, **settings: Any) -> Self:
        return cls(was, **settings)

    def mix(self, hidden: Tensor, angles: tuple[Tensor, Tensor], state: State | None, real: Tensor | None) -> Tensor:
        query, key = functional.silu(apart(self.q_proj(hidden), self.heads)), functional.silu(apart(self.k_proj(hidden), self.groups))
        if self.rotary:
            query, key = _turned(query, angles), _turned(key, angles)
        many = self.heads // self.groups
        key = key.repeat_interleave(many, 1)  # every query head forgets at its own rate, so it has its own sums
        value = apart(self.v_proj(hidden), self.groups).repeat_interleave(many, 1)
        sums = None if state is None else state.held.get("sums")
        decay = torch.tensor(self.slopes, device=hidden.device)
        out, sums = linear(query, key, value, sums=sums, real=real, decay=decay)
        if state is not None:
            state.held = {"sums": sums}
        made = _norm(together(out))
        return self.o_proj(made if self.gate is None else made * self.gate(hidden))


def _turned(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [b, h, t, d] turned by rotary angles [1 or b, t, width], on its first `width` channels."""
    cos, sin = (angle[:, None] for angle in angles)
    part, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = part.chunk(2, -1)
    return torch.cat([part * cos + torch.cat([-high, low], -1) * sin, rest], -1)


def _norm(x: Tensor) -> Tensor:
    """x sqrt(n) / |x| over the last dimension, all heads together; 0 stays 0."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8)).to(x.dtype)


def slopes(heads: int, layer: int, layers: int) -> list[float]:
    """s of each head: 2^(-8 (i + 1) / h), as ALiBi's, times 1 - l / (L - 1) + 1e-5, so the last layer hardly forgets."""
    share = 1 - layer / max(1, layers - 1) + 1e-5
    return [2 ** (-8 * (head + 1) / heads) * share for head in range(heads)]


@dataclass(frozen=True)
class Lightning(Converting):
    """o_i = q_i sum_(j <= i) e^(-s (i - j)) k_j v_j^T, y = W_o (o sqrt(n) / |o| * W_u x), q = swish(W_q x), k = swish(W_k x).

    hidden [b, t, D] -> [b, t, D]; q, k, v [b, h, t, d]; s = 2^(-8 i / h) (1 - l / (L - 1) + 1e-5) of head i = 1 .. h and layer l =
    0 .. L - 1, fixed; the norm is over all n = h d channels, without a gain. Of the model are W_q, W_k, W_v and W_o, the very
    parameters; new is the gate W_u [h d, D] (`gate=False`: none), drawn as nn.Linear draws. Rotary angles in layer 0 only, the decay
    says the rest of the order. Norms of queries and keys (Qwen3) are left out. Keys and values of grouped heads are repeated,
    as each query head has its own s.

    State: the sums [d, d] of each query head, float32 whatever the model's: 4 b h d^2 bytes a layer for any text, those of a
    float32 KV cache of h d / (2 g) tokens. FLOPs of a token: 4 h d (B + d) in prefill, B = 128 the chunk, 4 h d^2 in decode; softmax's
    are 4 h d n at place n. Raises SmeltError for attention without separate linear maps. The model needs training after it.

    Differs from the paper: in layer 0 the model's own rotary angles, where LRPE learns them; the model's MLP and norms stay (SGLU
    and SimpleRMSNorm there); plain torch, no kernel: the split into chunks is the same.
    """

    paper: ClassVar = Paper("TransNormerLLM", "arXiv:2307.14995", "gated linear attention; chunks: Lightning Attention-2, arXiv:2401.04658")
    module: ClassVar[type[MixerModule]] = _Mixer
    gate: bool = True
    layers: tuple[int, ...] | None = None

    def mixer(self, was: nn.Module, config: Any) -> MixerModule:
        sizes = parts(config)
        index: Any = was.layer_idx
        made = _Mixer(was, slopes(sizes.heads, index, sizes.layers), self.gate, rotary=index == 0)
        if made.gate is not None:
            made.gate.reset_parameters()
        return made

    def state_bytes(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 4) -> int:
        sizes = parts(config)
        layers = sizes.layers if self.layers is None else len(self.layers)
        return 4 * layers * batch * sizes.heads * sizes.head_dim**2

    @classmethod
    def example(cls) -> Self:
        return cls()
