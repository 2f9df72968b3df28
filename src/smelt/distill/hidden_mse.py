"""Let chosen layers of the student write what chosen layers of the teacher write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from smelt.distill import Equipped
from smelt.distill._divergence import wide
from smelt.model._load import Loaded
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["HiddenMSE"]


@dataclass(frozen=True)
class HiddenMSE(Equipped):
    """loss = 1/M sum_m |P_m h^S[s_m] - h^T[t_m]|^2 / d_T over M aligned layers, in squares of the teacher's units (not nats).

    layers="uniform"    s -> round(s L_T / L_S) for s = 1 .. L_S, so that the last goes to the last
    layers="last"       the last to the last, both after the final norm
    layers=[[2, 5]]     pairs (student, teacher); 0 is the embedding, n what block n leaves, the last is after the final norm
    P_m is the identity where both widths are equal, else a linear map of the student's state to the teacher's width, without
    bias, one per pair, trained beside the student (so the teacher's states stay the target and cannot be shrunk away).

    Shapes: student_hidden: tuple of [b, t, d_S], teacher_hidden: tuple of [b, t, d_T] -> [b, t]. Zero, with a zero gradient,
    where the aligned states are equal. Gradient of h^S[s_m]: 2 P_m^T (P_m h^S - h^T) / (M d_T). Cost: 6 d_S d_T FLOPs a pair and
    position where there is a map; bytes: one [b, t, d_T] a pair. A loss of features: later layers and the head learn nothing from it.

    Raises SmeltError for a layer that is not there. States grow with depth, so a pair of late layers weighs more than an early one.

    Differs from the paper: the attention term is left out (see minilm); the paper narrows the teacher's states by PCA
    where widths differ; its rounding of the layer map is not established: reconstruction (it keeps every k-th layer).
    """

    paper: ClassVar = Paper(
        "Distilling Efficient Language-Specific Models for Cross-Lingual Transfer", "arXiv:2306.01709", "BiStil, first phase"
    )
    zero_at_teacher: ClassVar = True
    layers: Any = "uniform"  # or "last", or pairs of integers

    def __post_init__(self) -> None:
        if self.layers in ("uniform", "last"):
            return
        pairs = self.layers if isinstance(self.layers, (list, tuple)) else ()
        if not pairs or not all(isinstance(p, (list, tuple)) and [type(x) for x in p] == [int, int] for p in pairs):
            raise SmeltError(f"hidden_mse: layers={str(self.layers)[:40]!r}; write 'uniform', 'last' or pairs such as [[2, 4], [5, 8]]")
        object.__setattr__(self, "layers", tuple((s, t) for s, t in pairs))  # a recipe writes lists, which cannot be hashed

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        if teacher is None:
            raise SmeltError("hidden_mse needs a teacher; write 'teacher: NAME' in its train block")
        own, other = parts(student.model.config), parts(teacher.model.config)
        pairs = aligned(self.layers, own.layers, other.layers)
        count = len(pairs) if own.hidden != other.hidden else 0
        return _Maps(pairs, [nn.Linear(own.hidden, other.hidden, bias=False) for _ in range(count)])

    def __call__(self, student_hidden: tuple[Tensor, ...], teacher_hidden: tuple[Tensor, ...], equipment: Any) -> Tensor:
        found = []
        for at, (s, t) in enumerate(equipment.pairs):
            state = equipment.maps[at](student_hidden[s]) if equipment.maps else student_hidden[s]
            found.append((wide(state) - wide(teacher_hidden[t].detach())).square().mean(-1))
        return torch.stack(found).mean(0)


class _Maps(nn.Module):
    """`pairs` of aligned layers and, where widths differ, a map for each."""

    def __init__(self, pairs: tuple[tuple[int, int], ...], maps: list[nn.Linear]):
        super().__init__()
        self.pairs, self.maps = pairs, nn.ModuleList(maps)


def aligned(layers: Any, student: int, teacher: int) -> tuple[tuple[int, int], ...]:
    """Pairs of indices into the hidden states of models with that many blocks, none negative. Halves are rounded up."""
    if layers == "uniform":
        return tuple((s, max(1, (2 * s * teacher + student) // (2 * student))) for s in range(1, student + 1))
    if layers == "last":
        return ((student, teacher),)
    for pair in layers:
        for who, at, count in zip(("student", "teacher"), pair, (student, teacher), strict=True):
            if not -count - 1 <= at <= count:
                raise SmeltError(f"hidden_mse: layer {at} of the {who}, which has 0 (the embedding) to {count}")
    return tuple((s % (student + 1), t % (teacher + 1)) for s, t in layers)
