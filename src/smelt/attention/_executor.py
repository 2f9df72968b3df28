"""Attention that computes only the chosen blocks of keys; what block_sparse, pbs and flex_prefill share.

Queries and keys are cut into blocks of `block` tokens. Every (row, head, query block) reads its own list of key blocks. Those with
lists of equal length, of whatever head and query block, run as one gathered sdpa: no padding of lists, so no mask per head, which
costs sdpa on a CPU half as much again. The diagonal block comes last in every list, so one causal mask serves all of a group. What a
row computes depends on its own lists only, bit for bit. Nothing of size tokens x tokens is held.

    with counting() as counts:
        model(ids)
    print(counts.computed / counts.causal)  # the fraction of blocks computed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

__all__ = ["Counts", "attend", "by_padding", "counting", "dense", "expanded", "is_causal", "means", "plain", "prefill"]

GATHERED = 1 << 22  # bytes of gathered keys and values held at once: read again before they leave a cache of this size
ROWS = 1024  # rows of a mask compared at once


@dataclass
class Counts:
    """Pairs of blocks that `attend` computed, and those it would have for causal attention; calls left to sdpa are in neither."""

    computed: int = 0
    causal: int = 0


_counts: ContextVar[Counts | None] = ContextVar("counts", default=None)


@contextmanager
def counting() -> Iterator[Counts]:
    """Counts blocks for the length of the block, in its thread. An inner block counts for itself only."""
    counts = Counts()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def attend(
    query: Tensor, key: Tensor, value: Tensor, chosen: Tensor, block: int, scaling: float, *, dropout: float = 0.0,
    earlier: tuple[Tensor, Tensor, int] | None = None,
) -> Tensor:  # fmt: skip
    """softmax over the keys of the chosen blocks, causal in the diagonal one, which is always read.

    query [b, h, t, d] are the last t of s positions; key and value [b, g, s, d]; chosen [b or 1, h or 1, m, n] bool with n
    blocks of keys and m of queries (those the t queries lie in); what lies right of the diagonal is ignored -> [b, h, t, d].
    Chosen alike for all heads ([., 1, ., .]): the query heads of one key head read one gathered copy.
    `earlier` = (keys, values, each [b, h, s, d], segment): what query blocks read in place of key and value
    from blocks of segments before their own (segment: blocks of one).
    FLOPs 4 b h block^2 d per pair of blocks computed; copies 2 block d numbers per pair (per pair of key heads when alike).
    """
    b, h, t, _ = query.shape
    g, s, m, n = key.shape[1], key.shape[2], chosen.shape[2], chosen.shape[3]
    lead = (s - t) % block
    at = torch.arange(n - m, n, device=query.device)[:, None]
    blocks = torch.arange(n, device=query.device)
    chosen = (chosen & (blocks < at)) | (blocks == at)
    stack = h // g if chosen.shape[1] == 1 else 1  # query heads that run as one
    heads = h // stack
    chosen = chosen.expand(b, heads, m, n)
    if (counts := _counts.get()) is not None:
        counts.computed += int(chosen.sum()) * stack
        counts.causal += b * h * int((at + 1).sum())
    keys, values = _blocks(key, block).flatten(0, 2), _blocks(value, block).flatten(0, 2)
    rows = torch.arange(b, device=query.device)[:, None] * g + torch.arange(heads, device=query.device) // (heads // g)
    source = (rows[:, :, None, None] * n + blocks).expand(b, heads, m, n)
    if earlier is not None:
        keys, values = (torch.cat([own, _blocks(old, block).flatten(0, 2)]) for own, old in zip((keys, values), earlier[:2]))
        rows = torch.arange(b * h, device=query.device).view(b, h, 1, 1)
        source = torch.where(blocks // earlier[2] < at // earlier[2], b * g * n + rows * n + blocks, source)
    queries = functional.pad(query, (0, 0, lead, -s % block)).view(b, heads, stack, m, block, -1)
    queries = queries.transpose(2, 3).reshape(b * heads * m, 1, stack * block, -1)
    chosen, source = chosen.reshape(-1, n), source.reshape(-1, n)
    length = chosen.sum(-1)
    order = length.argsort(stable=True)
    lengths, sizes = torch.unique_consecutive(length[order], return_counts=True)
    made, size = [], block * (key.shape[3] + value.shape[3]) * key.element_size()
    for count, group in zip(lengths.tolist(), order.split(sizes.tolist())):
        mask = query.new_full((block, count * block), -torch.inf).triu((count - 1) * block + 1).repeat(stack, 1)
        for items in group.split(max(1, GATHERED // (count * size))):
            picked = source[items][chosen[items]]  # in the order of the blocks, the diagonal one last
            k, v = (x.index_select(0, picked).view(len(items), 1, count * block, -1) for x in (keys, values))
            made.append(functional.scaled_dot_product_attention(queries[items], k, v, mask, dropout, scale=scaling))
    out = torch.cat(made)[order.argsort()].view(b, heads, m, stack, block, -1).transpose(2, 3).reshape(b, h, m * block, -1)
    return out[:, :, lead : lead + t]


def _blocks(x: Tensor, block: int) -> Tensor:
    """[b, h, s, d] -> [b, h, n, block, d]; zeros fill the last one, where the causal mask hides them from every real query."""
    return functional.pad(x, (0, 0, 0, -x.shape[2] % block)).unflatten(2, (-1, block))


def means(x: Tensor, block: int) -> Tensor:
    """[..., s, d] -> [..., n, d] float32: the mean of each block, of its real tokens in the last one."""
    s = x.shape[-2]
    total = functional.pad(x.float(), (0, 0, 0, -s % block)).unflatten(-2, (-1, block)).sum(-2)
    first = torch.arange(0, s, block, device=x.device)
    return total / (s - first).clamp(max=block)[:, None]


def expanded(chosen: Tensor, block: int, t: int, s: int) -> Tensor:
    """[..., m, n] of blocks -> [..., t, s] of tokens, causal: the mask under which dense sdpa computes what `attend` does."""
    n = chosen.shape[-1]
    eye = torch.eye(n, dtype=torch.bool, device=chosen.device)[n - chosen.shape[-2] :]
    wide = (chosen | eye).repeat_interleave(block, -2).repeat_interleave(block, -1)
    lead = (s - t) % block
    return wide[..., lead : lead + t, :s].tril(s - t)


def plain(query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float = 0.0) -> Tensor:
    """Dense causal sdpa [b, h, t, d]; the queries are the last of the keys' positions."""
    t, s = query.shape[2], key.shape[2]
    mask = None if t in (1, s) else torch.ones(t, s, dtype=torch.bool, device=query.device).tril(s - t)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout, t == s, scale=scaling)


def dense(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' own sdpa."""
    return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **kwargs)


def is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    said = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if said is None else said)


def prefill(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], block: int, module: Any, query: Tensor, key: Tensor, value: Tensor,
    mask: Tensor | None, scaling: float, kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`attend(query, key, value)` on whole prompts (t = s) of more than two blocks, each row without its padding; sdpa for all else."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v) if k.shape[2] > 2 * block else plain(q, k, v, scaling, kwargs.get("dropout", 0.0))

    if is_causal(module, kwargs) and query.shape[2] == key.shape[2] > 2 * block:
        made = by_padding(run, query, key, value, mask)
        if made is not None:
            return made.transpose(1, 2).contiguous(), None
    return dense(module, query, key, value, mask, scaling, **kwargs)


def by_padding(
    run: Callable[[Tensor, Tensor, Tensor], Tensor], query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor | None:
    """`run(query, key, value)` -> [b, h, t, d] on the rows without their padding, rows with equal padding together; 0 for
    padded queries. None, and nothing computed, where the mask is not causality with padding at the ends of rows."""
    ends = _real(mask, query, key)
    if ends is None:
        return None
    t, s = query.shape[2], key.shape[2]
    made, order = [], []
    for start, stop in sorted(set(ends)):
        rows = [row for row, end in enumerate(ends) if end == (start, stop)]
        first, last = max(0, start - (s - t)), stop - (s - t)  # of the real queries
        parts = query[:, :, first:last], key[:, :, start:stop], value[:, :, start:stop]
        out = run(*(parts if len(rows) == len(ends) else (x[rows] for x in parts)))
        made.append(functional.pad(out, (0, 0, first, t - last)))
        order += rows
    return made[0] if len(made) == 1 else torch.cat(made)[torch.tensor(order, device=query.device).argsort()]


def _real(mask: Tensor | None, query: Tensor, key: Tensor) -> list[tuple[int, int]] | None:
    """(first, last + 1) of each row's real keys."""
    b, t, s = query.shape[0], query.shape[2], key.shape[2]
    if mask is None:
        return [(0, s)] * b if t in (1, s) else None
    if mask.dtype != torch.bool or mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[-2:] != (t, s):
        return None
    last = mask[:, 0, -1].expand(b, s).int()
    start, stop = last.argmax(-1), s - last.flip(-1).argmax(-1)
    keys = torch.arange(s, device=mask.device)
    for low in range(0, t, ROWS):
        at = torch.arange(s - t + low, s - t + min(t, low + ROWS), device=mask.device)[:, None]
        first, end = start[:, None, None], stop[:, None, None]
        wrong = mask[:, 0, low : low + ROWS] != (keys <= at) & (keys >= first) & (keys < end)
        if bool((wrong & (at >= first) & (at < end)).any()):
            return None
    found = list(zip(start.tolist(), stop.tolist()))
    return found if all(b > max(a, s - t) for a, b in found) and bool(last.any(-1).all()) else None
