"""Forward KL to a student that is mixed with a little of the teacher: no token it missed can cost without bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.distill._mixture import mixture
from smelt.spec import Paper

__all__ = ["SkewKL"]


@dataclass(frozen=True)
class SkewKL:
    """loss = T^2 KL(p || M), M = alpha p + (1 - alpha) q, nats per token; p = softmax(teacher / T), q = softmax(student / T).

    Shapes: student [..., v], teacher [..., v] -> [...]. Gradient of the student's logits: T (1 - alpha) q (E_q[r] - r) with
    r = p / M, which is at most 1 / alpha. Zero, with a zero gradient, exactly where p = q. The loss is at most
    T^2 log(1 / alpha), reached where p and q share no token; there the gradient goes to 0 too. alpha -> 0 is forward_kl.
    A logit of -inf on either side is no trouble.

    Cost: two softmaxes, one logarithm and two exponentials more, about 25 v operations a position; one buffer of the size
    of the logits is kept for backward.

    Differs from the paper: it pairs this loss with answers of the student taken from a replay buffer; this is the loss
    alone, on given text. The factor T^2 is that of the other divergences here; the paper has T = 1.
    """

    paper: ClassVar = Paper("DistiLLM: Towards Streamlined Distillation for Large Language Models", "arXiv:2402.03898", "skew KL")
    zero_at_teacher: ClassVar = True
    alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    temperature: Annotated[float, Gt(0)] = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature, self._rule)

    def _rule(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        to_p, _ = mixture(log_p, log_q, self.alpha)
        p, q = log_p.exp_(), log_q.exp_()
        more = torch.expm1(-to_p)  # r - 1, exactly 0 where p = q
        loss = -torch.linalg.vecdot(p, to_p.masked_fill_(p == 0, 0))
        return loss, more.sub_(torch.linalg.vecdot(q, more)[..., None]).mul_(q).mul_(self.alpha - 1)
