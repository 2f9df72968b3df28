"""Runs of neighbouring rows taken out of a cache, each head its own: contiguous runs copy far faster than single tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from smelt.cache._layers import Grown

__all__ = ["picked"]


def picked(held: Grown, index: Tensor, size: int) -> Tensor:
    """Blocks `index` [b, g h, m] of `size` rows each -> [b, g h, m size, d]; head i reads from the head i // g of `held` [b, h, n, d].

    One `index_select` over rows: copies m size d elements per head and nothing else.
    """
    assert held.store is not None, "asked for blocks before the first append"
    b, h, room = held.store.shape[:3]
    device = index.device
    first = room * torch.arange(b * h, device=device).view(b, h).repeat_interleave(index.shape[1] // h, 1)
    rows = (first[..., None] + index * size)[..., None] + torch.arange(size, device=device)
    return held.store.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, (b, index.shape[1], -1))


def attended(query: Tensor, index: Tensor, keys: Grown, values: Grown, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query over its own blocks: (sum e^(s - top) v [b, g h, m, d], top = max s, sum e^(s - top), [b, g h, m, 1] both).

    query [b, g h, m, k, d] float32 and scaled, one for each block of `index` [b, g h, m, k] (all different), s the products with its
    `size` keys. One token (m = 1) gathers what it reads. Many go block by block: those that chose a block of a kv head are
    multiplied with it in one product, and the sums are carried on as in flash attention, so no key is copied: b h n / size products.
    """
    b, heads, m, k, d = query.shape
    if m == 1:
        key, value = (picked(held, index.flatten(2), size).view(b, heads, 1, -1, d).float() for held in (keys, values))
        s = (key.unflatten(3, (k, size)) @ query.unsqueeze(-1)).flatten(3)
        top = s.amax(-1, keepdim=True)
        p = (s - top).exp()
        return (p.unsqueeze(3) @ value).squeeze(3), top, p.sum(-1, keepdim=True)
    h, blocks = keys.rows.shape[1], len(keys) // size
    asked = query.reshape(-1, d)
    out, total = asked.new_zeros(b * heads * m, d), asked.new_zeros(b * heads * m, 1)
    top = torch.full_like(total, float("-inf"))
    owner = torch.arange(b * h, device=index.device).view(b, h).repeat_interleave(heads // h, 1)[..., None, None]
    place = (owner * blocks + index).flatten()
    for one, chosen in zip(*_groups(place), strict=True):
        row, block = divmod(one, blocks)
        key, value = (held.rows[row // h, row % h, block * size : (block + 1) * size].float() for held in (keys, values))
        rows = chosen // k  # a query has a block at most once
        s, before = asked[chosen] @ key.mT, top[rows]
        peak = torch.maximum(before, s.amax(-1, keepdim=True))
        p, fade = (s - peak).exp(), (before - peak).exp()
        out[rows] = out[rows] * fade + p @ value
        total[rows] = total[rows] * fade + p.sum(-1, keepdim=True)
        top[rows] = peak
    shape = (b, heads, m, -1)
    return out.view(shape), top.view(shape), total.view(shape)


def _groups(place: Tensor) -> tuple[list[int], tuple[Tensor, ...]]:
    """The different values of `place` [n] and where each of them stands."""
    ones, counts = place.unique(return_counts=True)
    return ones.tolist(), place.argsort(stable=True).split(counts.tolist())
