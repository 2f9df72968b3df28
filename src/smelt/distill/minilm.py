"""Teach the student which positions belong together: relations between queries, keys and values, not their entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn

from smelt.distill import Equipped
from smelt.distill._divergence import wide
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.model._walk import Parts, parts
from smelt.spec import Paper, SmeltError

__all__ = ["MiniLM"]

KL = ForwardKL()


@dataclass(frozen=True)
class MiniLM(Equipped):
    """loss_i = sum_r w_r mean_h KL(R^T_rhi || R^S_rhi), nats per position; R_rhi = softmax_{j <= i}(a_hi . b_hj / sqrt(d_h)).

    version=2  relations r: a = b = Q, K, V of one layer, each cut anew into `heads` relation heads on both sides; w = 1/3.
    version=1  r: a = Q, b = K (attention) and a = b = V (values), in the model's own heads; w = 1 each. Both models need the
               same number of query heads; key and value heads are repeated for the query heads they serve.

    Shapes: student_projected, teacher_projected: per layer q [b, t, h k], k, v [b, t, g k]; keep [b, t] -> [b, t]. Widths may
    differ: only softmaxes of [t, t] are compared, so nothing is projected. The first position of a row is 0 (it can
    relate to itself only) and so is one that does not count; as j every position stays, because it is there to be read.
    With `boundaries: mask` relations still reach across document ends. Zero, with a zero gradient, where the relations
    are equal: at Q = Q^T, K = K^T, V = V^T, and for V at any orthogonal turn of a head.
    Gradient of the scores a . b / sqrt(d): w (R^S - R^T) / heads; it reaches the student up to `student_layer`, so the last
    MLP, the norm and the head learn nothing. No language modelling: a stage before another, or a term of `weighted`.

    Cost per relation: 8 heads t^2 d_h FLOPs a row (both sides, forward and backward) and 12 heads t^2 bytes in float32.
    Raises SmeltError for a layer that is not there, heads that do not divide a width, and (version=1) unequal query heads.

    Differs from the papers: queries and keys are taken before the rotary angles (and before a norm of queries, where a
    model has one), as angles of different head sizes cannot be compared; the causal mask is inside every softmax; the layer is
    the last of both unless said otherwise (v2 takes an upper-middle one of a deep teacher: `teacher_layer=-4`); v2 has
    heads=48 at width 768.
    """

    paper: ClassVar = Paper(
        "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        "arXiv:2002.10957",
        "section 3; version=2: arXiv:2012.15828",
    )
    zero_at_teacher: ClassVar = True
    version: Literal[1, 2] = 2
    heads: Annotated[int, Ge(1)] = 8  # relation heads of version 2; they divide the widths of queries and of keys, on both sides
    student_layer: int = -1  # which block; -1 is the last
    teacher_layer: int = -1

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        if teacher is None:
            raise SmeltError("minilm needs a teacher; write 'teacher: NAME' in its train block")
        sizes = [parts(one.model.config) for one in (student, teacher)]
        for who, size, layer in zip(("student", "teacher"), sizes, (self.student_layer, self.teacher_layer), strict=True):
            if not -size.layers <= layer < size.layers:
                raise SmeltError(f"minilm: {who}_layer={layer}, but the {who} has {size.layers} layers, 0 to {size.layers - 1}")
            for what, count in (("queries", size.heads), ("keys and values", size.kv_heads)):
                if self.version == 2 and count * size.head_dim % self.heads:
                    raise SmeltError(f"minilm: heads={self.heads} does not divide the width {count * size.head_dim} of the {who}'s {what}")
        if self.version == 1 and sizes[0].heads != sizes[1].heads:
            raise SmeltError(
                f"minilm: version=1 needs equal query heads; the student has {sizes[0].heads}, the teacher {sizes[1].heads}: take version=2"
            )
        return _Heads(*sizes)

    def __call__(
        self,
        student_projected: tuple[tuple[Tensor, Tensor, Tensor], ...],
        teacher_projected: tuple[tuple[Tensor, Tensor, Tensor], ...],
        keep: Tensor,
        equipment: Any,
    ) -> Tensor:
        made = [
            self._relations(projected[layer], *own)
            for projected, layer, own in (
                (student_projected, self.student_layer, (equipment.student_heads, equipment.student_kv)),
                (teacher_projected, self.teacher_layer, (equipment.teacher_heads, equipment.teacher_kv)),
            )
        ]
        total = torch.stack([KL(scores(*s), scores(*t).detach()).mean(1) for s, t in zip(*made, strict=True)])
        loss = total.sum(0) if self.version == 1 else total.mean(0)
        return torch.where(keep, loss, 0.0)

    def _relations(self, projected: tuple[Tensor, Tensor, Tensor], heads: int, kv: int) -> list[tuple[Tensor, Tensor]]:
        """Pairs (a, b) whose products are compared, each [b, heads, t, d]."""
        if self.version == 2:
            return [(x, x) for x in (split(x, self.heads) for x in projected)]
        q, k, v = (split(x, count) for x, count in zip(projected, (heads, kv, kv), strict=True))
        k, v = (x.repeat_interleave(heads // kv, 1) for x in (k, v))
        return [(q, k), (v, v)]


class _Heads(nn.Module):
    """How many heads each side has; no parameters."""

    def __init__(self, student: Parts, teacher: Parts):
        super().__init__()
        self.student_heads, self.student_kv = student.heads, student.kv_heads
        self.teacher_heads, self.teacher_kv = teacher.heads, teacher.kv_heads


def split(x: Tensor, heads: int) -> Tensor:
    """[b, t, heads d] -> [b, heads, t, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def scores(a: Tensor, b: Tensor) -> Tensor:
    """a . b / sqrt(d) [b, heads, t, t], -inf above the diagonal: softmax and its divergences leave such places out."""
    made = wide(a @ b.mT) / a.shape[-1] ** 0.5
    later = torch.ones(made.shape[-2:], dtype=torch.bool, device=made.device).triu(1)
    return made.masked_fill(later, -torch.inf)
