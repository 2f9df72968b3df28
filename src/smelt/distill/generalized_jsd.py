"""Between the two KLs: both models are compared with their mixture, so that no token can cost without bound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt, Interval
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.distill._mixture import mixture
from smelt.spec import Paper, SmeltError

__all__ = ["GeneralizedJSD"]


@dataclass(frozen=True)
class GeneralizedJSD:
    """loss = T^2 (beta KL(p || M) + (1 - beta) KL(q || M)), M = beta p + (1 - beta) q, nats per token; p teacher, q student.

    p = softmax(teacher / T), q = softmax(student / T). Shapes: student [..., v], teacher [..., v] -> [...]. Gradient of the
    student's logits: T (1 - beta) q (log(q / M) - KL(q || M)). Zero, with a zero gradient, exactly where p = q. At most
    T^2 times the entropy of (beta, 1 - beta), log 2 for beta = 0.5; a logit of -inf on either side is no trouble.

    Small beta goes towards forward KL, large beta towards reverse KL, but the loss itself goes to 0 at both ends: only
    loss / beta has the limit KL(p || q), and loss / (1 - beta) the limit KL(q || p). So the ends are refused, and with
    Adam or Muon, which do not see a scale, beta turns the direction of the step and not its length.
    Cost: two softmaxes, two logarithms and two exponentials more, about 30 v operations a position; one buffer of the
    size of the logits is kept for backward. Raises SmeltError for beta outside (0, 1).

    Differs from the paper: GKD takes the divergence on answers of the student too; this is the divergence alone, on given
    text. The factor T^2 is that of the other divergences here; the paper has T = 1.
    """

    paper: ClassVar = Paper("On-Policy Distillation of Language Models (GKD)", "arXiv:2306.13649", "generalized JSD")
    zero_at_teacher: ClassVar = True
    beta: Annotated[float, Interval(ge=0, le=1)] = 0.5
    temperature: Annotated[float, Gt(0)] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            end = "forward_kl()" if self.beta <= 0 else "reverse_kl()"
            raise SmeltError(f"generalized_jsd: at beta={self.beta} the loss is 0 everywhere; write {end}, the limit of its direction")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature, self._rule)

    def _rule(self, log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
        to_p, to_q = mixture(log_p, log_q, self.beta)
        p, q = log_p.exp_(), log_q.exp_()
        of_p = -torch.linalg.vecdot(p, to_p.masked_fill_(p == 0, 0))
        of_q = -torch.linalg.vecdot(q, to_q.masked_fill_(q == 0, 0))
        slope = to_q.add_(of_q[..., None]).mul_(q).mul_(self.beta - 1)
        return self.beta * of_p + (1 - self.beta) * of_q, slope
