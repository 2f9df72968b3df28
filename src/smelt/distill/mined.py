"""Translate the teacher's distribution token by token: to the student's token that is spelt most alike."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from smelt.distill import Equipped
from smelt.distill._alignment import distances, nearest, pieces, warped
from smelt.distill._divergence import wide
from smelt.distill._holding import token_divergence
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.spec import Paper

__all__ = ["MinED"]

NOWHERE = -1e5  # logit of a token that no token of the teacher is nearest to


@dataclass(frozen=True)
class MinED(Equipped):
    """loss = (1 - rate) CE + rate D(z_q, z'), z'_v = max of z_p(w) over tokens w nearest to v; CE = -log q(x), nats per token.

    Nearest: minimal edit distance of the bytes, found once (`equipment`). Positions: the ids that both read, prompts left
    out, are put beside each other by dynamic time warping with the edit distance of two tokens as cost. D counts where a
    student's position has one partner and the teacher's token there is mapped to the student's; elsewhere CE stands for it.

    Shapes: student [b, t, v], labels, keep, student_ids [b, t], teacher [b, s, w], teacher_ids, teacher_keep [b, s] -> [b, t].
    Gradient: that of `divergence` (forward_kl: q - softmax(z')). Cost: the vocabulary map once (see `_alignment.nearest`);
    a step adds about 12 word operations a byte for each pair of different tokens in the batch, and t + s vector steps of
    numpy on the CPU, twice. Raises SmeltError for a divergence that reads more than student and teacher.

    Differs from the paper (FuseLLM merges several teachers' top logits and trains on the result): the form is the one used
    as a baseline in DSKD's code, max over mapped logits and one-hot elsewhere. Reconstruction: one map, from the teacher's
    tokens to the student's, stands for the two it uses; bytes are compared, with the space a token begins with.
    """

    paper: ClassVar = Paper("Knowledge Fusion of Large Language Models", "arXiv:2401.10491", "section 3.2, minimum edit distance")
    zero_at_teacher: ClassVar = False
    divergence: Any = field(default_factory=ForwardKL)
    rate: Annotated[float, Interval(gt=0, le=1)] = 0.5

    def __post_init__(self) -> None:
        token_divergence(self.divergence, "mined: divergence")

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        assert teacher is not None  # the loop refuses a missing teacher first
        sides = (student, teacher)
        return _Spelling(*(pieces(one.tokenizer, one.model.get_output_embeddings().weight.shape[0]) for one in sides))

    def __call__(
        self,
        student: Tensor,
        labels: Tensor,
        keep: Tensor,
        student_ids: Tensor,
        teacher: Tensor,
        teacher_ids: Tensor,
        teacher_keep: Tensor,
        equipment: Any,
    ) -> Tensor:
        plain = CrossEntropy()(student, labels)
        at = partners(equipment, student_ids, keep, teacher_ids, teacher_keep)
        row, here = torch.nonzero(at >= 0, as_tuple=True)
        mapping = equipment.nearest[: teacher.shape[-1]]
        known = mapping >= 0
        theirs = wide(teacher.detach()[row, at[row, here]])[:, known]
        index = mapping[known].expand(len(row), -1)
        mapped = theirs.new_full((len(row), student.shape[-1]), NOWHERE).scatter_reduce_(1, index, theirs, "amax")
        taught = plain.index_put((row, here), self.divergence(student=student[row, here], teacher=mapped).to(plain.dtype))
        return (1 - self.rate) * plain + self.rate * taught


class _Spelling(nn.Module):
    """What the ids of both sides spell, and the student's id nearest to each of the teacher's."""

    nearest: Tensor

    def __init__(self, student: list[bytes], teacher: list[bytes]):
        super().__init__()
        self.student, self.teacher = student, teacher
        self.register_buffer("nearest", nearest(teacher, student))


def partners(spelling: _Spelling, ids: Tensor, keep: Tensor, teacher_ids: Tensor, teacher_keep: Tensor) -> Tensor:
    """[b, t]: the teacher's position in whose place a student's position stands, -1 where there is none that is sure."""
    mine, theirs = _packed(ids, keep), _packed(teacher_ids, teacher_keep)
    few, which = np.unique(mine[0], return_inverse=True)
    few_theirs, which_theirs = np.unique(theirs[0], return_inverse=True)
    table = distances([spelling.student[i] for i in few], [spelling.teacher[i] for i in few_theirs])
    cost = table[which.reshape(mine[0].shape)[:, :, None], which_theirs.reshape(theirs[0].shape)[:, None, :]]
    match = torch.from_numpy(warped(cost, mine[2], theirs[2])).to(ids.device)
    at = torch.from_numpy(theirs[1]).to(ids.device).gather(1, match.clamp(min=0))
    places = torch.from_numpy(mine[1]).to(ids.device)
    found = torch.full_like(ids, -1).scatter(1, places, torch.where(match >= 0, at, -1))
    same = spelling.nearest[teacher_ids.gather(1, found.clamp(min=0))] == ids
    return torch.where(keep & (found >= 0) & same, found, -1)


def _packed(ids: Tensor, keep: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(ids with the kept ones first, the positions they come from, how many are kept)."""
    order = torch.argsort((~keep).to(torch.uint8), dim=-1, stable=True)
    return ids.gather(1, order).cpu().numpy(), order.cpu().numpy(), keep.sum(-1).cpu().numpy()
