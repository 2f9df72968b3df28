"""Reverse KL to a teacher that is mixed with a little of the student: no token the teacher rules out costs without bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.distill._mixture import mixture
from smelt.spec import Paper

__all__ = ["SkewReverseKL"]


@dataclass(frozen=True)
class SkewReverseKL:
    """loss = T^2 KL(q || M), M = alpha q + (1 - alpha) p, nats per token; p = softmax(teacher / T), q = softmax(student / T).

    Shapes: student [..., v], teacher [..., v] -> [...]. Gradient of the student's logits: T q (g - E_q[g]) with
    g = log(q / M) - alpha q / M; the mixture moves with the student. Zero, with a zero gradient, exactly where p = q. The
    loss is at most T^2 log(1 / alpha). alpha -> 0 is reverse_kl; a logit of -inf on either side is no trouble.

    Cost: two softmaxes, one logarithm and two exponentials more, about 25 v operations a position; one buffer of the size
    of the logits is kept for backward.

    Differs from the paper: it pairs this loss with answers of the student taken from a replay buffer; this is the loss
    alone, on given text. The factor T^2 is that of the other divergences here; the paper has T = 1.
    """

    paper: ClassVar = Paper("DistiLLM: Towards Streamlined Distillation for Large Language Models", "arXiv:2402.03898", "skew reverse KL")
    zero_at_teacher: ClassVar = True
    alpha: Annotated[float, Interval(gt=0, lt=1)] = 0.1
    temperature: Annotated[float, Gt(0)] = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature, self._rule)

    def _rule(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        to_q, _ = mixture(log_q, log_p, self.alpha)
        q = log_q.exp_()
        gap = to_q.neg_().masked_fill_(q == 0, 0)  # log(q / M)
        loss = torch.linalg.vecdot(q, gap)
        gap.sub_(gap.expm1(), alpha=self.alpha)
        return loss, gap.sub_(torch.linalg.vecdot(q, gap)[..., None]).mul_(q)
