"""Say only what the teacher would say: the student is punished for mass where the teacher has none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor

from smelt.distill._divergence import divergence
from smelt.spec import Paper

__all__ = ["ReverseKL"]


@dataclass(frozen=True)
class ReverseKL:
    """loss = T^2 sum_v q_v (log q_v - log p_v), nats per token; p = softmax(teacher / T), q = softmax(student / T).

    Shapes: student [..., v], teacher [..., v] -> [...]. Gradient of the student's logits:
    T q (log q - log p - KL(q || p)). Zero, with a zero gradient, exactly where p = q.

    A token with q_v = 0 costs nothing; p_v = 0 where q_v > 0 costs infinity, so a teacher's logits must be finite.
    Cost: two softmaxes, about 12 v operations a position; one buffer of the size of the logits is kept for backward.

    Differs from the paper: MiniLLM minimises KL(q || p) of whole answers sampled from the student, by policy
    gradient; this is its single-step part on every position of given text, with nothing sampled. On given text it
    seeks one mode: expect it nearer to the teacher's first choice and worse in perplexity than forward_kl.
    """

    paper: ClassVar = Paper("MiniLLM: Knowledge Distillation of Large Language Models", "arXiv:2306.08543", "eq. 1 and section 2.2")
    zero_at_teacher: ClassVar = True
    temperature: Annotated[float, Gt(0)] = 1.0

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return divergence(student, teacher, self.temperature, _rule)


def _rule(log_q: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    q = log_q.exp()
    gap = log_q.sub_(log_p).masked_fill_(q == 0, 0)
    loss = torch.linalg.vecdot(q, gap)
    return loss, gap.sub_(loss[..., None]).mul_(q)
