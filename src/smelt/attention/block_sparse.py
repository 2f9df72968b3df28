"""A fixed block-sparse pattern: the first blocks, the blocks before the query's own, and every so many-th."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional

from smelt.attention import Attention
from smelt.attention._executor import attend, by_padding, dense, is_causal, plain
from smelt.spec import Paper

__all__ = ["BlockSparse"]


@dataclass(frozen=True)
class BlockSparse(Attention):
    """softmax over the keys j <= i of blocks B(j) with B(j) < sinks, B(i) - B(j) <= local, or stride dividing B(j) + 1; B(x) = x // block.

    query [b, h, t, d], key and value [b, g, s, d], mask bool -> output [b, t, h, d]. The pattern is one of positions, so a
    prompt in one call, in chunks and token by token give the same; padding at the ends of rows does not count. Two
    blocks or fewer: plain sdpa, which the pattern then equals.

    Cost: 4 b h block^2 d FLOPs per pair of blocks; about n (sinks + local + 1) + n^2 / (2 stride) pairs of n (n + 1) / 2.
    A new token reads (sinks + local + 1 + n / stride) blocks of the cache and copies them first. The bytes of
    the cache stay. Any other mask (windows, trees, a static cache) is computed densely under the pattern, for the same figures.
    An evicting cache shifts the pattern with what it drops, since positions here are places among the keys given.

    Differs from the paper: one pattern for all heads (the fixed one: the last block of every `stride`), whole blocks of it
    rather than its last c positions, and without training; sinks are the A-shape of MInference (arXiv:2407.02490, section 3.1)
    and the global tokens of BigBird (arXiv:2007.14062, section 2), whose random blocks are left out.
    """

    mask: ClassVar = "bool"
    paper: ClassVar = Paper("Generating Long Sequences with Sparse Transformers", "arXiv:1904.10509", "section 4.3, fixed attention")
    block: Annotated[int, Ge(1)] = 128  # tokens
    sinks: Annotated[int, Ge(0)] = 1  # blocks at the start
    local: Annotated[int, Ge(1)] = 4  # blocks before the query's own
    stride: Annotated[int, Ge(0)] = 8  # 0: none

    @classmethod
    def unlimited(cls) -> Self:
        return cls(block=8, local=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(block=8, local=1, stride=4)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if not is_causal(module, kwargs) or key.shape[2] <= 2 * self.block:
            return dense(module, query, key, value, attention_mask, scaling, **kwargs)
        dropout = kwargs.get("dropout", 0.0)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            first, s = k.shape[2] - q.shape[2], k.shape[2]
            if s <= 2 * self.block:
                return plain(q, k, v, scaling, dropout)
            if first // self.block == (s - 1) // self.block:  # one query block: a new token, or a few
                return self._step(q, k, v, scaling, dropout)
            return attend(q, k, v, self.choose(first, s, q.device), self.block, scaling, dropout=dropout)

        made = by_padding(run, query, key, value, attention_mask)
        if made is not None:
            return made.transpose(1, 2).contiguous(), None
        if attention_mask is None or attention_mask.dtype != torch.bool:
            return dense(module, query, key, value, attention_mask, scaling, **kwargs)
        return dense(module, query, key, value, attention_mask & self._under(attention_mask), scaling, **kwargs)

    def choose(self, first: int, tokens: int, device: Any = None) -> Tensor:
        """[1, 1, m, n] bool: the blocks of keys that the blocks of queries at positions first .. tokens - 1 read."""
        blocks = torch.arange(-(-tokens // self.block), device=device)
        return self._keeps(blocks[first // self.block :, None], blocks)[None, None]

    def _keeps(self, query: Tensor, key: Tensor) -> Tensor:
        kept = (key < self.sinks) | (query - key <= self.local)
        return (kept | ((key + 1) % self.stride == 0) if self.stride else kept) & (key <= query)

    def _step(self, query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float) -> Tensor:
        """Queries of one block, with all heads reading the same copy; only what is read is copied."""
        t, s = query.shape[2], key.shape[2]
        own = (s - 1) // self.block * self.block
        picked = self.choose(own, s, query.device)[0, 0, 0, :-1].nonzero()[:, 0]

        def read(x: Tensor) -> Tensor:
            old = x[:, :, :own].unflatten(2, (-1, self.block)).index_select(2, picked).flatten(2, 3)
            return torch.cat([old, x[:, :, own:]], 2)

        key, value = read(key), read(value)
        stack = query.shape[1] // key.shape[1]
        mask = (
            None if t == 1 else torch.ones(t, key.shape[2], dtype=torch.bool, device=query.device).tril(key.shape[2] - t).repeat(stack, 1)
        )
        query = query.unflatten(1, (-1, stack)).flatten(2, 3)
        out = functional.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scaling)
        return out.unflatten(2, (stack, t)).flatten(1, 2)

    def _under(self, mask: Tensor) -> Tensor:
        """[b, 1, t, s] bool: the pattern at the positions an arbitrary mask [b, 1, t, s] tells: a query stands at its last visible key."""
        keys = torch.arange(mask.shape[3], device=mask.device)
        start = mask[:, :, -1:].int().argmax(-1, keepdim=True)
        at = (mask * (keys + 1)).amax(-1, keepdim=True) - 1
        block = torch.div(keys - start, self.block, rounding_mode="floor")
        return self._keeps(torch.div(at - start, self.block, rounding_mode="floor"), block)
