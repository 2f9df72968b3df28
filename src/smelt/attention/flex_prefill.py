"""FlexPrefill: every head picks, prompt by prompt, a vertical-slash or a query-aware pattern of blocks, and how many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Gt
from torch import Tensor
from torch.nn import functional

from smelt.attention import Attention
from smelt.attention._executor import attend, means, prefill
from smelt.spec import Paper

__all__ = ["FlexPrefill"]


@dataclass(frozen=True)
class FlexPrefill(Attention):
    """softmax over the blocks of vertical_slash(gamma), or query_aware(gamma) where sqrt(JSD(true, estimated block weights)) < tau.

    Both block weights are those of the last `block` queries: true ones, and softmax(mean(q) . block means of keys * scaling).
    vertical_slash: as many key blocks, and block diagonals, as the fewest single keys (diagonals) with gamma of those
    queries' weight would fill, the heaviest, besides the first key block and the main diagonal. query_aware: the fewest pairs
    of blocks with gamma of the weight of softmax(block means of queries . block means of keys * scaling), summed over all
    rows, united with vertical_slash at the smallest budget. query [b, h, n, d], key and value [b, g, n, d], mask bool
    -> output [b, n, h, d]. JSD in nats. Exact at gamma 1.

    Whole prompts only (n queries on n keys, more than two blocks), each row without its padding; decoding, chunks and other masks
    are plain sdpa. What is read follows from the end of the prompt; no value or key of a later token is.

    Cost per head: block n d for the weights of the last queries, n log n + (n / block)^2 (d + log n) for the choice,
    4 block^2 d FLOPs per pair of blocks computed; 4 block n bytes of weights are held twice per head during the choice.

    Differs from the paper: nothing in the equations. From the released code: tokens are counted in blocks of `block`, where the
    code has 128; no largest budget. Reconstruction: the last `block` queries where the prompt ends inside a block, and a
    block diagonal k reads block i - k alone. tau = 0 leaves query_aware out, as the released code does by default.
    """

    mask: ClassVar = "bool"
    prompt_wide: ClassVar = True
    paper: ClassVar = Paper(
        "FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
        "arXiv:2502.20766",
        "section 3, algorithms 1 to 4",
    )
    block: Annotated[int, Ge(1)] = 128  # tokens
    gamma: Annotated[float, Gt(0)] = 0.9  # weight to keep; 1: all blocks
    tau: Annotated[float, Ge(0)] = 0.1  # largest distance at which block means are trusted
    min_budget: Annotated[int, Ge(0)] = 512  # tokens of key blocks, and of diagonals

    @classmethod
    def unlimited(cls) -> Self:
        return cls(block=8, gamma=1.0)

    @classmethod
    def example(cls) -> Self:
        return cls(block=8, gamma=0.3, min_budget=8)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v, self.choose(q, k, scaling), self.block, scaling, dropout=kwargs.get("dropout", 0.0))

        return prefill(run, self.block, module, query, key, value, attention_mask, scaling, kwargs)

    @torch.no_grad()
    def choose(self, query: Tensor, key: Tensor, scaling: float) -> Tensor:
        """[b, h, m, m] bool: the blocks of keys that each block of queries reads, m blocks in n tokens."""
        n = key.shape[2]
        m = -(-n // self.block)
        causal = torch.ones(m, m, dtype=torch.bool, device=query.device).tril()
        if self.gamma >= 1:
            return causal.expand(*query.shape[:2], m, m)
        weight = tail(query, key, scaling, self.block)
        least = -(-self.min_budget // self.block)
        chosen = vertical_slash(weight, self.block, self.gamma, least)
        if self.tau > 0:
            keys = means(key, self.block).repeat_interleave(query.shape[1] // key.shape[1], 1)
            pooled = query[:, :, -self.block :].float().mean(2, keepdim=True) @ keys.mT * scaling
            trusted = divergence(_by_block(weight.mean(2), self.block), pooled[:, :, 0].softmax(-1)) < self.tau
            if bool(trusted.any()):
                aware = query_aware(means(query, self.block) @ keys.mT * scaling, self.gamma)
                aware = aware | vertical_slash(weight, self.block, 0.0, least)
                chosen = torch.where(trusted[..., None, None], aware, chosen)
        return chosen


def tail(query: Tensor, key: Tensor, scaling: float, block: int) -> Tensor:
    """[b, h, r, n] float32: the causal attention weights of the last r = min(block, n) queries."""
    b, h, n, d = query.shape
    g, rows = key.shape[1], min(block, n)
    score = (query[:, :, -rows:].reshape(b, g, -1, d) @ key.mT).float() * scaling
    seen = torch.ones(rows, n, dtype=torch.bool, device=query.device).tril(n - rows)
    return score.view(b, h, rows, n).masked_fill(~seen, -torch.inf).softmax(-1)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """sqrt(JSD(p || q)) over the last dimension, in nats; 0 log 0 = 0."""
    middle = (p + q) / 2
    parts = [torch.xlogy(x, x) - torch.xlogy(x, middle) for x in (p.double(), q.double())]
    return (sum(part.sum(-1) for part in parts) / 2).clamp(min=0).sqrt()  # type: ignore[union-attr]


def vertical_slash(weight: Tensor, block: int, gamma: float, least: int) -> Tensor:
    """[b, h, m, m] bool from the weights [b, h, r, n] of the last r queries; at least `least` key blocks and diagonals."""
    rows, n = weight.shape[2:]
    columns = weight.mean(2)
    skewed = functional.pad(weight.flip(-1), (0, rows)).flatten(2)[..., rows - 1 : rows - 1 + rows * (n + rows - 1)]
    diagonals = skewed.unflatten(2, (rows, n + rows - 1))[..., :n].mean(2)  # [.., k]: weight on the key k tokens back
    across, along = (_heaviest(x, block, gamma, least) for x in (columns, diagonals))
    m = across.shape[-1]
    at = torch.arange(m, device=weight.device)
    back = at[:, None] - at
    slash = along[..., back.clamp(min=0)]
    return (across[..., None, :] | slash | (at == 0) | (back == 0)) & (back >= 0)


def _heaviest(weight: Tensor, block: int, gamma: float, least: int) -> Tensor:
    """[.., m] bool: as many of the heaviest blocks as the fewest of n single weights [.., n] with a sum of gamma would fill, and one."""
    n = weight.shape[-1]
    fewest = (weight.sort(-1, descending=True).values.double().cumsum(-1) < gamma).sum(-1) + 1
    pooled = _by_block(weight, block)
    count = (fewest.clamp(max=n) // block + 1).clamp(min=max(least, 1), max=pooled.shape[-1])
    place = pooled.argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return place < count[..., None]


def query_aware(score: Tensor, gamma: float) -> Tensor:
    """[b, h, m, m] bool: the fewest entries whose share of the causal softmax of [b, h, m, m], summed over all rows, is gamma or more."""
    m = score.shape[-1]
    causal = torch.ones(m, m, dtype=torch.bool, device=score.device).tril()
    weight = score.masked_fill(~causal, -torch.inf).softmax(-1).flatten(2)
    best = weight.sort(dim=-1, descending=True, stable=True)
    values = best.values.double()
    fewest = values.cumsum(-1) - values < gamma * m
    return torch.zeros_like(fewest).scatter(-1, best.indices, fewest).unflatten(2, (m, m)) & causal


def _by_block(x: Tensor, block: int) -> Tensor:
    return functional.pad(x, (0, -x.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)
