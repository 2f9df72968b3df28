"""A target that starts near the student and moves to the teacher, faster while the student keeps up."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor, nn

from smelt.distill import Stateful
from smelt.distill._divergence import wide
from smelt.distill._holding import token_divergence
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.spec import Paper, SmeltError

__all__ = ["TAID"]


@dataclass(frozen=True)
class TAID(Stateful):
    """loss = objective(student = z_q, teacher = (1 - t) sg(z_q) + t z_p), nats per token; z student's and teacher's logits.

    sg stops the gradient: with forward_kl it is q - r, r the softmax of the mixed logits, (T times that of both at T), 0 at
    t = 0 and that of forward_kl at t = 1. Shapes: student [..., v], teacher [..., v] -> [...]. Zero at the teacher where the
    objective is. After every optimizer step but the first, J its loss and J' the one before:

        m <- momentum m + (1 - momentum) (J' - J) / J'      t <- min(end, max(line, t + rate sigmoid(m) (1 - t)))

    with line = start + (end - start) progress; the first step only stores J. `interpolated` keeps t on the line instead.
    So t never falls and is `end` after the last step. State: three scalars in every checkpoint. A short training follows the
    line: of n steps the rate adds at most n rate (1 - start), 0.01 in 32 steps of the defaults.

    Cost: the objective, and one mixture more: 3 v operations a position and one buffer of the size of the logits (two in
    half precision). Logits must be finite. Raises SmeltError for start > end and an objective that is no token divergence.

    Differs from the paper: J is the loss of the whole effective batch, where the code takes every micro-batch's; J is the KL
    that the text has, where the code has the cross-entropy (the entropy of r more: same gradient, smaller relative changes).
    A KL can start at 0, so a rise counts as at most a doubling: (J' - J) / J' >= -1. `line` is that of the steps done, this
    one included. Held in `weighted`, J is the loss of all its objectives together.
    """

    paper: ClassVar = Paper("TAID: Temporally Adaptive Interpolated Distillation", "arXiv:2501.16937", "section 3 and algorithm 1")
    zero_at_teacher: ClassVar = True
    objective: Any = field(default_factory=ForwardKL)
    start: Annotated[float, Interval(ge=0, lt=1)] = 0.4
    end: Annotated[float, Interval(gt=0, le=1)] = 1.0
    rate: Annotated[float, Interval(ge=0, le=1)] = 5e-4
    momentum: Annotated[float, Interval(ge=0, lt=1)] = 0.99
    interpolated: bool = False

    def __post_init__(self) -> None:
        token_divergence(self.objective, "taid: objective")
        if self.start > self.end:
            raise SmeltError(f"taid: start={self.start} is after end={self.end}; the target moves from the student to the teacher")

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        return _State(self.start)

    def __call__(self, student: Tensor, teacher: Tensor, equipment: Any) -> Tensor:
        own = wide(student.detach())
        target = torch.lerp(own, wide(teacher.detach()).to(own.dtype), equipment.t.to(own.dtype))
        return self.objective(student=student, teacher=target)

    def after(self, equipment: Any, loss: float, progress: float) -> None:
        line = self.start + (self.end - self.start) * progress
        if self.interpolated:
            equipment.t.fill_(line)
            return
        before, t = equipment.previous.item(), equipment.t.item()
        equipment.previous.fill_(loss)
        if math.isinf(before):
            return
        gained = max(-1.0, (before - loss) / (before + 1e-15))
        kept = self.momentum * equipment.momentum.item() + (1 - self.momentum) * gained
        equipment.momentum.fill_(kept)
        equipment.t.fill_(min(self.end, max(line, t + self.rate * (1 - t) / (1 + math.exp(-kept)))))


class _State(nn.Module):
    t: Tensor
    previous: Tensor
    momentum: Tensor

    def __init__(self, start: float):
        super().__init__()
        self.register_buffer("t", torch.tensor(start))
        self.register_buffer("previous", torch.tensor(math.inf))  # no loss yet
        self.register_buffer("momentum", torch.tensor(0.0))
