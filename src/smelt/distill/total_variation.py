"""Half the sum of all differences: no logarithm, so one badly wrong token weighs no more than its probability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.spec import Paper

__all__ = ["TotalVariation"]


@dataclass(frozen=True)
class TotalVariation:
    """loss = 1/2 sum_v |p_v - q_v|, between 0 and 1, no unit; p = softmax(teacher), q = softmax(student).

    Shapes: student [..., v], teacher [..., v] -> [...]. Gradient of the student's logits: q (s - E_q[s]) / 2 with
    s = sign(q - p), and s = 0 where they are equal: a subgradient there. Zero, with a zero gradient, exactly where p = q.
    It is the chance that a best coupling of p and q draws two different tokens. Not in nats: beside another loss its
    weight has to be chosen. The gradient goes to 0 where q is nearly one token, right or wrong: a student that is sure of
    the wrong token learns nothing, so it is made for warm students.

    Cost: two softmaxes, about 10 v operations a position; one buffer of the size of the logits is kept for backward. A
    logit of -inf on either side is no trouble.

    Differs from the paper: there whole sequences are compared step by step, half of them sampled from the teacher and half
    from the student; this is its step on every position of given text. No temperature: T^2 is the scale of losses that
    are quadratic near p = q, which this one is not.
    """

    paper: ClassVar = Paper("f-Divergence Minimization for Sequence-Level Knowledge Distillation", "arXiv:2307.15190", "TVD")
    zero_at_teacher: ClassVar = True

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, 1.0, _rule)


def _rule(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp_()
    gap = torch.sub(q, log_p.exp_(), out=log_p)
    loss = gap.abs().sum(-1).mul_(0.5)
    side = gap.sign_()
    return loss, side.sub_(torch.linalg.vecdot(q, side)[..., None]).mul_(q).mul_(0.5)
