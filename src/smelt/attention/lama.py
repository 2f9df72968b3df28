"""Several learned views of a text, each an attention of low rank over its states: a head that makes one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from smelt.attention import Pooling
from smelt.spec import Paper

__all__ = ["Lama"]

Context = Literal["mean", "last", "max", "learned"]


class Heads(nn.Module):
    """(states [b, t, width], real [b, t] bool) -> [b, heads * width] float32, the rows M_i one after the other."""

    def __init__(self, width: int, heads: int, rank: int, context: Context, tanh: bool):
        super().__init__()
        self.context, self.tanh = context, tanh
        self.ask = nn.Parameter(torch.randn(heads, width, rank) * width**-0.5)  # P_i
        self.read = nn.Parameter(torch.randn(heads, width, rank) * width**-0.5)  # Q_i
        self.learned = nn.Parameter(torch.randn(width)) if context == "learned" else None

    def forward(self, states: Tensor, real: Tensor) -> Tensor:
        return torch.einsum("bmt,btd->bmd", self.weights(states, real), states.float()).flatten(1)

    def weights(self, states: Tensor, real: Tensor) -> Tensor:
        """alpha [b, heads, t] float32: of each head 1 in all, 0 where not real; all 0 in a row without a real token."""
        states = states.float()
        asked = torch.einsum("bd,mdr->bmr", self.about(states, real), self.ask.float())
        if self.tanh:
            score = torch.einsum("bmr,btmr->bmt", asked.tanh(), torch.einsum("btd,mdr->btmr", states, self.read.float()).tanh())
        else:  # Q_i (P_i^T c) first: r times fewer FLOPs over the tokens
            score = torch.einsum("bmd,btd->bmt", torch.einsum("bmr,mdr->bmd", asked, self.read.float()), states)
        keep = real[:, None]
        return score.masked_fill(~keep, torch.finfo(score.dtype).min).softmax(-1) * keep

    def about(self, states: Tensor, real: Tensor) -> Tensor:
        """c [b, width]."""
        keep = real[..., None]
        if self.learned is not None:
            return self.learned.float().expand(len(states), -1)
        if self.context == "mean":
            return (states * keep).sum(1) / keep.sum(1).clamp(min=1)
        if self.context == "max":
            return states.masked_fill(~keep, torch.finfo(states.dtype).min).amax(1) * keep.any(1)
        last = real.shape[1] - 1 - real.flip(1).long().argmax(1)
        return states[torch.arange(len(states), device=states.device), last] * keep.any(1)


@dataclass(frozen=True)
class Lama(Pooling):
    """M_i = sum_t a_it h_t, a_i = softmax_t(c^T P_i Q_i^T h_t); the vector is M_1, ..., M_m one after the other.

    h [b, t, D] are an encoder's states, c [b, D] what the text is about: their mean, last, maximum, or one learned vector
    for all texts. P_i, Q_i [D, r] of each of m `heads` stand for a matrix [D, D] of `rank` r. `tanh` bounds the two factors:
    sum_r tanh(P_i^T c) tanh(Q_i^T h_t).

    Parameters: 2 D m r (and D for a learned c), where m full matrices are m D^2. FLOPs linear in t: 4 t D m and 4 D m r a text,
    with tanh 2 t D m r more; m t weights are held. Output m D numbers, m times those of a mean. Float32 whatever the states are.

    No error of its own. Held by a method that makes vectors (embedding(pool=lama())), which trains it.

    Differs from the paper (reconstruction: sizes and the place of tanh are not established here): there a bidirectional GRU
    and a classifier stand around it, here the states are the model's. c is not scaled. Drawn from N(0, 1 / D), so that scores
    of unit states begin near 1.
    """

    paper: ClassVar = Paper("Low Rank Factorization for Compact Multi-Head Self-Attention", "arXiv:1912.00835", "section 3, LAMA")
    heads: Annotated[int, Ge(1)] = 10
    rank: Annotated[int, Ge(1)] = 1
    context: Context = "mean"
    tanh: bool = False

    def module(self, width: int) -> nn.Module:
        return Heads(width, self.heads, self.rank, self.context, self.tanh)
