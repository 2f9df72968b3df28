"""Compare how sure the two are, not of what: sorted probabilities need no common vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from annotated_types import Gt
from torch import Tensor
from torch.nn.functional import pad

from smelt.distill._alignment import ranked
from smelt.distill._divergence import divergence
from smelt.distill.cross_entropy import CrossEntropy
from smelt.spec import Paper

__all__ = ["ULD"]


@dataclass(frozen=True)
class ULD:
    """loss = -log q(x) + weight sum_r |q_(r) - p_(r)|, nats per token; q_(r), p_(r) the r-th largest probability of student and teacher.

    The smaller vocabulary is padded with zeros; the k-th kept position of a row is compared with the k-th of the teacher's
    row, which need not spell the same; positions the teacher has none for learn from the label alone. The sum is the
    optimal transport between two distributions whose tokens are all equally far apart, at most 2.

    Shapes: student [b, t, v], labels, keep [b, t], teacher [b, s, w], teacher_keep [b, s] -> [b, t]. Gradient of the
    student's logits: q - onehot(x) + weight q (g - sum q g), g_v = sign(q_(r) - p_(r)) at the rank r of v; 0 where equal.
    Cost: two sorts a position, of v and w; buffers of b t max(v, w) for the teacher's rows and the gradient.

    Differs from the paper: nothing in the loss; weight = 1.5 is as remembered from it (not re-checked).
    """

    paper: ClassVar = Paper("Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss", "arXiv:2402.12030", "eq. 4 to 6")
    zero_at_teacher: ClassVar = False
    weight: Annotated[float, Gt(0)] = 1.5

    def __call__(
        self, student: Tensor, labels: Tensor, keep: Tensor, teacher: Tensor, teacher_ids: Tensor, teacher_keep: Tensor
    ) -> Tensor:  # `teacher_ids` says that the teacher may have another tokenizer
        at = ranked(keep, teacher_keep)
        there = at >= 0
        theirs = teacher.gather(1, at.clamp(min=0)[..., None].expand(*at.shape, teacher.shape[-1]))
        mine, narrow = student, student.shape[-1]
        if theirs.shape[-1] < narrow:
            theirs = pad(theirs, (0, narrow - theirs.shape[-1]), value=-torch.inf)
        elif theirs.shape[-1] > narrow:
            mine = pad(student, (0, theirs.shape[-1] - narrow), value=-torch.inf)
        apart = divergence(mine, theirs, 1.0, partial(_rule, narrow=narrow))
        return CrossEntropy()(student, labels) + self.weight * torch.where(there, apart, 0.0)


def _rule(log_q: Tensor, log_p: Tensor, narrow: int) -> tuple[Tensor, Tensor]:
    """`narrow`: the columns that the student has; the others are padding and sort last by themselves."""
    q = log_q.exp_()
    gap = log_p.exp_().sort(-1, descending=True).values.neg_()
    most, place = q[:, :narrow].sort(-1, descending=True)
    gap[:, :narrow] += most
    slope = torch.zeros_like(q).scatter_(1, place, gap[:, :narrow].sign())
    return gap.abs().sum(-1), slope.sub_(torch.linalg.vecdot(q, slope)[:, None]).mul_(q)
