"""Keep in the student's states what can be known from them about the teacher's: a bound of their mutual information."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from smelt.distill import Equipped
from smelt.distill._divergence import wide
from smelt.model._load import Loaded
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["MIAlpha"]


@dataclass(frozen=True)
class MIAlpha(Equipped):
    """loss = -I_a, I_a = 1 + E_joint[f(x, y) - log(a m(y) + (1 - a) e^q(y))] - E_apart[e^f(x, y) / (a m(y) + (1 - a) e^q(y))], nats.

    x and y are the states of student and teacher at one position; m(y) is the mean of e^f(x_k, y) over K positions of the batch.
    alpha=1 is InfoNCE (at most log K, whatever the critic), alpha=0 the bound of Nguyen, Wainwright and Jordan, which has no
    such ceiling and a variance that grows as e^I. f(x, y) = g(x) . h(y) / sqrt(width) and the baseline q are maximised with
    the student: MLPs of one hidden layer of `width`, made as equipment.

    The kept positions of a micro-batch are dealt into sets of K = `group`, position i to set i mod (number of sets), so that
    neighbours part; the last few that fill no set are left out, and fewer than K in all make one set. x and y of one
    position are a joint pair; all other pairs of a set are pairs apart, and their m leaves the joint pair out.
    Shapes: student_hidden: tuple of [b, t, d_S], teacher_hidden: tuple of [b, t, d_T], keep [b, t] -> one value for the batch
    as [b, t]; 0 where fewer than 2 positions are kept. The loss is negative where anything is learned: there is no zero at the
    teacher, as any invertible image of its states is as good. So it belongs beside another objective, in `weighted`.

    Cost a position: 6 (2 (d_S + d_T) width + 3 width^2) FLOPs of the critics, 6 K width of the pairs; 8 K bytes.
    Raises SmeltError for a layer that is not there.

    Differs from the paper: critics are small MLPs with a product between them (the paper's are small Transformers); positions
    of a language model instead of sentences; one pair of layers instead of learned maps of many; alpha=0.5 and
    group=64 are ours. The expectation over pairs apart takes the K - 1 others of the set: reconstruction.
    """

    paper: ClassVar = Paper(
        "Distiller: A Systematic Study of Model Distillation Methods in Natural Language Processing", "arXiv:2109.11105", "MI-alpha"
    )
    zero_at_teacher: ClassVar = False
    whole_batch: ClassVar[bool] = True
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
    group: Annotated[int, Ge(2)] = 64
    width: Annotated[int, Ge(1)] = 128
    student_layer: int = -1  # 0 is the embedding, n what block n leaves, -1 the last after the final norm
    teacher_layer: int = -1

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        if teacher is None:
            raise SmeltError("mi_alpha needs a teacher; write 'teacher: NAME' in its train block")
        own, other = parts(student.model.config), parts(teacher.model.config)
        for who, size, layer in (("student", own, self.student_layer), ("teacher", other, self.teacher_layer)):
            if not -size.layers - 1 <= layer <= size.layers:
                raise SmeltError(f"mi_alpha: {who}_layer={layer}, but the {who} has 0 (the embedding) to {size.layers}")
        return _Critics(own.hidden, other.hidden, self.width, baseline=self.alpha < 1)

    def __call__(self, student_hidden: tuple[Tensor, ...], teacher_hidden: tuple[Tensor, ...], keep: Tensor, equipment: Any) -> Tensor:
        x, y = student_hidden[self.student_layer][keep], teacher_hidden[self.teacher_layer].detach()[keep]
        if len(x) < 2:
            return wide(student_hidden[self.student_layer]).sum(-1) * 0
        sets = max(1, len(x) // self.group)
        count = len(x) // sets if len(x) < self.group else self.group
        x, y = (z[: sets * count].view(count, sets, -1).transpose(0, 1) for z in (x, y))  # [sets, count, d]
        f, q = equipment(x, y)
        return -bound(wide(f), wide(q), self.alpha).mean().expand(keep.shape)


class _Critics(nn.Module):
    """x [..., K, d_S], y [..., K, d_T] -> f [..., K, K] (x by y) and q [..., K] of y (zeros without a baseline)."""

    def __init__(self, student: int, teacher: int, width: int, baseline: bool):
        super().__init__()
        self.x, self.y = (nn.Sequential(nn.Linear(n, width), nn.GELU(), nn.Linear(width, width)) for n in (student, teacher))
        self.q = nn.Sequential(nn.Linear(teacher, width), nn.GELU(), nn.Linear(width, 1)) if baseline else None

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        g, h = self.x(x), self.y(y)
        return g @ h.mT / g.shape[-1] ** 0.5, h.new_zeros(h.shape[:-1]) if self.q is None else self.q(y)[..., 0]


def bound(f: Tensor, q: Tensor, alpha: float) -> Tensor:
    """I_alpha [...] of sets of K pairs: f [..., K, K], x down and y across, joint pairs on the diagonal; q [..., K] of y."""
    count = f.shape[-1]
    joint = f.diagonal(dim1=-2, dim2=-1)
    apart = f.masked_fill(torch.eye(count, dtype=torch.bool, device=f.device), -torch.inf).logsumexp(-2) - math.log(count - 1)
    every = f.logsumexp(-2) - math.log(count)

    def below(m: Tensor) -> Tensor:  # log(alpha e^m + (1 - alpha) e^q)
        if alpha in (0, 1):
            return m if alpha else q
        return torch.logaddexp(m + math.log(alpha), q + math.log1p(-alpha))

    return 1 + (joint - below(every)).mean(-1) - (apart - below(apart)).exp().mean(-1)
