"""A divergence, and beside it how far a whole set of predictions is from the teacher's set: optimal transport between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from smelt.distill._divergence import wide
from smelt.distill._holding import token_divergence
from smelt.distill.forward_kl import ForwardKL
from smelt.spec import Paper

__all__ = ["SinKD"]


@dataclass(frozen=True)
class SinKD:
    """loss = objective + weight sum_ij K_ij W_ij, W_ij = |p_i - q_j|_1, K = Sinkhorn(exp(-W / epsilon)), of a chunk of rows.

    q_i = softmax(student / T) and p_i = softmax(teacher / T) at position i of a chunk of `rows` consecutive kept positions;
    the last chunk has what is left. Sinkhorn: `iterations` times all rows of K are divided by their sums, then all columns,
    on logarithms; the columns then sum to 1 exactly, the rows nearly. Shapes: student [..., v], teacher [..., v] -> [...];
    every position of a chunk is given the chunk's sum. The objective is in nats per token, the second term has no unit.

    The sum alone is meaningless: it does not change when the student's rows trade places. It is not 0 at the teacher
    either (mass that epsilon spreads over other rows). Gradient: that of the objective, and the taped one of the sum through
    all iterations. It compares positions with each other: how rows fall into micro-batches and processes changes it a
    little, and it must not be called on single positions. Raises SmeltError for an objective that is no token divergence.
    Cost: 2 rows v operations a position forward, as many backward, at rows = 16 and v = 4096 about 0.3 MFLOP a token
    besides the objective; about five buffers of the size of the logits.

    Differs from the paper: there the b samples of a classifier's batch are the rows; here b neighbours in the text. Its
    total a KD + (1 - a) CE + b 1e-3 sum, a = 0.8 to 1 and b = 0.8, is written here as weight = 8e-4, with cross-entropy from
    `weighted`; its KD has a temperature that goes to 1 over the epochs, which is not done.
    """

    paper: ClassVar = Paper("Sinkhorn Distance Minimization for Knowledge Distillation", "arXiv:2402.17110", "batch-wise Sinkhorn distance")
    zero_at_teacher: ClassVar = False
    whole_batch: ClassVar[bool] = True
    objective: Any = field(default_factory=ForwardKL)
    weight: Annotated[float, Ge(0)] = 8e-4
    temperature: Annotated[float, Gt(0)] = 2.0
    epsilon: Annotated[float, Gt(0)] = 0.1
    iterations: Annotated[int, Ge(1)] = 20
    rows: Annotated[int, Ge(2)] = 16

    def __post_init__(self) -> None:
        token_divergence(self.objective, "sinkd: objective")

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        loss = self.objective(student=student, teacher=teacher)
        q, p = ((wide(z).flatten(0, -2) if z.dim() > 1 else wide(z)[None]) for z in (student, teacher.detach()))
        q, p = ((z / self.temperature).softmax(-1) for z in (q, p))
        whole = len(q) - len(q) % self.rows
        moved = q.new_zeros(len(q))
        if whole:
            chunks = (-1, self.rows)
            sums = _transport(q[:whole].unflatten(0, chunks), p[:whole].unflatten(0, chunks), self.epsilon, self.iterations)
            moved[:whole] = sums.repeat_interleave(self.rows)
        if whole < len(q):
            moved[whole:] = _transport(q[whole:], p[whole:], self.epsilon, self.iterations)
        return loss + self.weight * moved.view(loss.shape)


def _transport(q: Tensor, p: Tensor, epsilon: float, iterations: int) -> Tensor:
    """sum_ij K_ij W_ij of distributions [..., b, v], [..., b, v] -> [...]."""
    apart = torch.cdist(p, q, p=1.0)
    log_k = -apart / epsilon
    for _ in range(iterations):
        log_k = log_k.log_softmax(-1).log_softmax(-2)
    return (log_k.exp() * apart).sum((-2, -1))
