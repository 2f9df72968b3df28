"""Forward and reverse KL, weighted at every position by where the student is further off: the teacher's head or its tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.spec import Paper

__all__ = ["AdaptiveKL"]


@dataclass(frozen=True)
class AdaptiveKL:
    """loss = T^2 (h KL(p || q) + (1 - h) KL(q || p)), h = sum_head |p - q| / sum_all |p - q|, nats per token.

    p = softmax(teacher / T), q = softmax(student / T). The tail are the teacher's least likely tokens, as many as have
    together a mass of at most `mu`; the head is the rest. Of equally likely tokens at the border, which one is in the tail
    is the sort's choice. Shapes: student [..., v], teacher [..., v] -> [...]. h counts as a constant: the gradient of the
    student's logits is T (h (q - p) + (1 - h) q (log q - log p - KL(q || p))), not the derivative of the value. Zero, with
    a zero gradient, exactly where p = q.

    A token with p_v = 0 where q_v > 0 costs infinity, so a teacher's logits must be finite.
    Cost: two softmaxes and a sort, about 20 v + v log2 v operations a position (the sort is most of it); one buffer of the
    size of the logits is kept for backward.

    Differs from the paper: its weights are those of T = 1; here they are taken at T like the losses.
    """

    paper: ClassVar = Paper(
        "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models", "arXiv:2404.02657", "adaptive KL"
    )
    zero_at_teacher: ClassVar = True
    mu: Annotated[float, Interval(gt=0, lt=1)] = 0.5
    temperature: Annotated[float, Gt(0)] = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature, self._rule)

    def _rule(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        p, q = log_p.exp(), log_q.exp()
        more = q - p
        ascending, order = p.sort(dim=-1)
        apart = more.abs().gather(-1, order)  # in the order of the mask, which is that of the sort
        tail = ascending.cumsum(-1) <= self.mu
        whole, head = apart.sum(-1), apart.masked_fill_(tail, 0).sum(-1)
        share = head / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        gap = log_q.sub_(log_p)
        forward = -torch.linalg.vecdot(p, gap.masked_fill(p == 0, 0))
        gap.masked_fill_(q == 0, 0)
        reverse = torch.linalg.vecdot(q, gap)
        slope = gap.sub_(reverse[..., None]).mul_(q)
        return share * forward + (1 - share) * reverse, slope.lerp_(more, share[..., None])
