"""Learn the teacher's whole distribution: the student is paid to cover everything the teacher might say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.spec import Paper

__all__ = ["ForwardKL"]


@dataclass(frozen=True)
class ForwardKL:
    """loss = T^2 sum_v p_v (log p_v - log q_v), nats per token; p = softmax(teacher / T), q = softmax(student / T).

    Shapes: student [..., v], teacher [..., v] -> [...]. Gradient of the student's logits: T (q - p). Zero, with a zero
    gradient, exactly where p = q. The factor T^2 keeps the gradient's size as T grows; for T -> infinity it goes to
    (z_q - mean z_q - z_p + mean z_p) / v.

    A token with p_v = 0 (a logit of -inf) costs nothing; q_v = 0 where p_v > 0 costs infinity.
    Cost: two softmaxes, about 12 v operations a position; one buffer of the size of the logits is kept for backward.

    Differs from the paper: there the soft loss is a cross-entropy, -T^2 sum p log q, mixed with the cross-entropy of
    the labels; the entropy of p is taken off here (same gradient, and zero means equal) and no labels are mixed in.
    """

    paper: ClassVar = Paper("Distilling the Knowledge in a Neural Network", "arXiv:1503.02531", "section 2")
    zero_at_teacher: ClassVar = True
    temperature: Annotated[float, Gt(0)] = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature, _rule)


def _rule(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    p = log_p.exp()
    gap = log_p.sub_(log_q).masked_fill_(p == 0, 0)
    return torch.linalg.vecdot(p, gap), log_q.exp_().sub_(p)
