"""Explicit sparse attention: the largest scores of each query, nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional

from smelt.attention import Attention
from smelt.spec import Paper

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK(Attention):
    """softmax over the `keep` largest scores q.k * scaling of each query and head, zero elsewhere; ties all stay.

    query [b, h, t, d], key and value [b, g, s, d], mask additive -> output [b, t, h, d], weights [b, h, t, s].
    Cost: that of dense attention, 4 b h t s d FLOPs and b h t s scores held, and a selection over s. A reference to
    measure what sparse attention loses; it is not faster and saves no memory.

    Differs from the paper: nothing in the selection; the paper trains with it, here it may also be set on a model
    that was trained densely. Equal scores at the threshold are all kept, where a sort would pick some of them.
    """

    paper: ClassVar = Paper("Explicit Sparse Transformer", "arXiv:1912.11637", "section 2, top-k selection")
    keep: Annotated[int, Ge(1)] = 64  # keys of each query

    @classmethod
    def unlimited(cls) -> Self:
        return cls(keep=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(keep=5)

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
        score = query @ key.mT * scaling
        if attention_mask is not None:
            score = score + attention_mask
        if self.keep < score.shape[-1]:
            floor = score.topk(self.keep, -1).values[..., -1:]
            score = score.masked_fill(score < floor, -torch.inf)
        weight = score.softmax(-1, dtype=torch.float32).to(query.dtype)
        weight = functional.dropout(weight, kwargs.get("dropout", 0.0))
        return (weight @ value).transpose(1, 2).contiguous(), weight
