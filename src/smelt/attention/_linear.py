"""Causal linear attention, chunk by chunk, and what the mixers made of it share: features, maps, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from smelt.model._walk import parts
from smelt.spec import SmeltError

__all__ = ["apart", "kept", "linear", "new", "state_bytes", "taylor", "taylor_width", "together", "total"]

CHUNK = 128  # tokens that meet each other as a matrix; the rest goes through the sums


def linear(
    query: Tensor, key: Tensor, value: Tensor, *, sums: Tensor | None = None, real: Tensor | None = None, decay: Tensor | None = None,
    divide: bool = False, features: Callable[[Tensor], Tensor] = lambda x: x, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o_i = phi(q_i) S_i [/ phi(q_i) z_i], S_i = e^-s S_(i-1) + phi(k_i) v_i^T, z_i = e^-s z_(i-1) + phi(k_i).

    query [b, h, n, f], key [b, g, n, f], value [b, g, n, d] -> output [b, h, n, d] in the dtype of value, and the sums
    [b, g, F, d] after the last token, float32 or wider; g divides h, query heads i h/g .. read key head i. With `divide` by
    z the sums have one more column, z: it is the sum of a value that is always 1. `sums` of an earlier call go on here.
    decay: s >= 0 of each key head [g]. real [b, n] bool: a token that is not enters no sum and decays nothing, wherever it
    stands. A query before any real token gives 0.

    Within a chunk the matrix phi(q) phi(k)^T, masked; between chunks the sums. Every power of e^-s is of the tokens between two
    places, so none overflows. Cost: 2 b n (h (chunk (F + d) + F d) + g F d) FLOPs, linear in n; memory besides the output: one
    chunk's features and scores (those of all chunks, with the sums between them, where gradients are wanted).
    """
    kind = torch.promote_types(value.dtype, torch.float32)
    groups, tokens = key.shape[1], key.shape[2]
    query = query.unflatten(1, (groups, -1))
    filled = functional.pad(value.to(kind), (0, 1), value=1.0) if divide else value.to(kind)
    made = []
    for start in range(0, tokens, chunk):
        part = slice(start, start + chunk)
        there = None if real is None else real[:, part]
        k = features(key[:, :, part].to(kind))
        if there is not None:
            k = k * there[:, None, :, None]
        out, sums = _chunk(features(query[:, :, :, part].to(kind)), k, filled[:, :, part], sums, there, decay)
        made.append(out)
    out = torch.cat(made, 3)
    if divide:
        out = out[..., :-1] / out[..., -1:].clamp_min(1e-12)
    assert sums is not None
    return out.flatten(1, 2).to(value.dtype), sums


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, sums: Tensor | None, real: Tensor | None, decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """query [b, g, r, c, F], key [b, g, c, F], value [b, g, c, d] -> [b, g, r, c, d] and the sums after it."""
    many, tokens = query.shape[2:4]
    rows = query.flatten(2, 3)
    score = (rows @ key.mT).unflatten(2, (many, tokens)).tril()
    before = None if sums is None else (rows @ sums).unflatten(2, (many, tokens))
    if decay is not None:
        steps = torch.arange(1, tokens + 1, device=key.device)[None] if real is None else real.cumsum(1)
        steps = steps.to(key.dtype)[:, None] * decay.to(key.dtype)[:, None]  # [1 or b, g, c], s times the tokens since the chunk began
        score = score * (steps[..., None] - steps[..., None, :]).clamp_min(0).neg().exp()[:, :, None]
        before = None if before is None else before * steps.neg().exp()[:, :, None, :, None]
        key = key * (steps - steps[..., -1:]).exp()[..., None]
        sums = None if sums is None else sums * steps[..., -1:, None].neg().exp()
    out = (score.flatten(2, 3) @ value).unflatten(2, (many, tokens))
    added = key.mT @ value
    return (out if before is None else out + before), (added if sums is None else sums + added)


def total(key: Tensor, value: Tensor, features: Callable[[Tensor], Tensor], real: Tensor | None = None) -> Tensor:
    """The sums [b, g, F, d + 1] of all tokens, as `linear` with `divide` leaves them and goes on from; no outputs."""
    kind = torch.promote_types(value.dtype, torch.float32)
    key = features(key.to(kind))
    if real is not None:
        key = key * real[:, None, :, None]
    return key.mT @ functional.pad(value.to(kind), (0, 1), value=1.0)


def taylor(x: Tensor) -> Tensor:
    """phi(x) with phi(q) phi(k) = 1 + s + s^2 / 2, s = q k / sqrt(f): [..., f] -> [..., 1 + f + f (f + 1) / 2].

    Each product x_i x_j stands once, with weight 1 where i < j and 1 / sqrt(2) where i = j. The kernel is ((s + 1)^2 + 1) / 2 >= 1/2.
    """
    width = x.shape[-1]
    x = x / width**0.25
    low, high = torch.triu_indices(width, width, device=x.device)
    square = x[..., low] * x[..., high] * torch.where(low == high, 0.5**0.5, 1.0).to(x.dtype)
    return torch.cat([torch.ones_like(x[..., :1]), x, square], -1)


def taylor_width(width: int) -> int:
    return 1 + width + width * (width + 1) // 2


def state_bytes(config: Any, width: int, layers: tuple[int, ...] | None, batch: int) -> int:
    """Of the float32 sums of `taylor` features with `divide`, in these layers (None: in all)."""
    sizes = parts(config)
    count = sizes.layers if layers is None else len(layers)
    return 4 * count * batch * sizes.kv_heads * taylor_width(width) * (sizes.head_dim + 1)


def kept(was: Any, method: str, *names: str) -> list[nn.Linear]:
    """Those maps of an attention module, the parameters as they are. Raises SmeltError where it has no such linear maps."""
    found = [getattr(was, name, None) for name in names]
    for name, one in zip(names, found):
        if not isinstance(one, nn.Linear):
            raise SmeltError(
                f"attention: {method} keeps linear maps {', '.join(names)}, and {type(was).__name__} has no such '{name}'; "
                "convert a llama-like model, before its weights are quantized or factorized"
            )
    return found  # type: ignore[return-value]


def new(inputs: int, outputs: int, like: Tensor) -> nn.Linear:
    """A linear map without bias and without values yet, so that one that is loaded draws no random numbers."""
    return nn.utils.skip_init(nn.Linear, inputs, outputs, bias=False, device=like.device, dtype=like.dtype)


def apart(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # [b, n, h f] -> [b, h, n, f]


def together(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)  # [b, h, n, f] -> [b, n, h f]
