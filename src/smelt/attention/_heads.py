"""Queries, keys and values of a llama-like attention module, read from outside it: what a mixer keeps of it, or learns from."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.model._swap import Swapped
from smelt.spec import SmeltError

__all__ = ["Shape", "adopt", "attended", "heads", "refuse", "shape", "weights"]

MAPS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm")


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


def refuse(was: nn.Module, method: str) -> None:
    """Raises SmeltError for attention that is more than softmax(q k^T scaling) v over rotated queries and keys, all of them causal."""
    config: Any = was.config
    inside = dict(was.named_children())
    strange = sorted(set(inside) - set(MAPS))
    fused, apart = "qkv_proj" in inside, {"q_proj", "k_proj", "v_proj"} <= set(inside)
    if strange or not (fused or apart) or "o_proj" not in inside:
        found = ", ".join(inside) or "nothing"
        raise SmeltError(f"attention: {method} takes the place of attention with q_proj, k_proj, v_proj and o_proj; this one has {found}")
    for name, module in inside.items():
        if isinstance(module, Swapped):
            raise SmeltError(
                f"attention: {method} cannot keep {name}, which is already another module; convert first, then change the maps"
            )
        if name in ("q_norm", "k_norm") and module.weight.shape != (was.head_dim,):
            raise SmeltError(f"attention: {method} knows norms of one head's queries and keys, and {name} is wider")
    if getattr(was, "sliding_window", getattr(config, "sliding_window", None)) is not None:
        raise SmeltError(f"attention: {method} learns from full attention, and this layer sees a sliding window")
    for name in ("attn_logit_softcapping", "clip_qkv"):
        if getattr(config, name, None) is not None:
            raise SmeltError(f"attention: {method} does not do what {name}={getattr(config, name)} asks for")


def shape(was: Any) -> Shape:
    out, width = was.o_proj.weight.shape
    query = width // was.head_dim
    if (fused := getattr(was, "qkv_proj", None)) is not None:
        return Shape(query, (fused.weight.shape[0] // was.head_dim - query) // 2, was.head_dim, out)
    return Shape(query, was.k_proj.weight.shape[0] // was.head_dim, was.head_dim, out)


def adopt(mixer: Any, was: Any) -> None:
    """Give a mixer all that `heads` reads: the very maps and norms of `was`."""
    for name, module in was.named_children():
        setattr(mixer, name, module)
    mixer.head_dim, mixer.scaling = was.head_dim, was.scaling


def heads(module: Any, hidden: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [b, t, D] -> queries [b, h, t, d], keys and values [b, g, t, d], queries and keys normed and rotated."""
    if (fused := getattr(module, "qkv_proj", None)) is not None:
        _, groups, d, _ = shape(module)
        made = fused(hidden)
        query, key, value = made.split([made.shape[-1] - 2 * groups * d, groups * d, groups * d], -1)
    else:
        query, key, value = module.q_proj(hidden), module.k_proj(hidden), module.v_proj(hidden)
    query, key, value = (x.unflatten(-1, (-1, module.head_dim)) for x in (query, key, value))
    if (norm := getattr(module, "q_norm", None)) is not None:
        query, key = norm(query), module.k_norm(key)
    return rotated(query.transpose(1, 2), angles), rotated(key.transpose(1, 2), angles), value.transpose(1, 2)


def rotated(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [b, h, t, d] turned by halves over the first channels, as many as there are angles [1 or b, t, width]."""
    cos, sin = (part.unsqueeze(1) for part in angles)
    width = cos.shape[-1]
    turning = x[..., :width]
    left, right = turning.chunk(2, -1)
    turned = turning * cos + torch.cat((-right, left), -1) * sin
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def attended(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """What causal softmax attention gives before o_proj: [b, h, t, d]."""
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)


def weights(query: Tensor, key: Tensor, scaling: float) -> Tensor:
    """The causal softmax matrices [b, h, t, t], float32."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = query.float() @ key.float().mT * scaling
    later = torch.ones(score.shape[-2:], dtype=torch.bool, device=score.device).triu(1)
    return score.masked_fill(later, -torch.inf).softmax(-1)
