"""Learn the teacher's answers and the nearest of its layers, so that unfamiliar text stays surprising to the student."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn

from smelt.distill import Equipped
from smelt.distill._divergence import wide
from smelt.distill._holding import token_divergence
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["OODLayers"]


@dataclass(frozen=True)
class OODLayers(Equipped):
    """loss = D(z_T, z_S) + sum_s sum_{the n smallest over t = 1 .. L_T} |W_t h^T_t + c_t - h^S_s|^2 / d_S per token, n = `nearest`.

    Every token chooses, for every student layer s of `layers`, the teacher layers that are nearest to it after their linear
    maps; all weights are 1. D is `divergence` (nats per token); the squares are in the student's units. layers=[] are
    the middle half of the blocks, L/4 to 3L/4 (3 to 9 of 12, as in the paper's code).

    Shapes: student, teacher [b, t, v]; student_hidden: tuple of [b, t, d_S], teacher_hidden: tuple of [b, t, d_T] -> [b, t].
    Gradient of h^S_s: 2 sum (h^S - W h^T - c) / d_S over the chosen layers; the choice itself has none. Not zero at the teacher,
    because the maps start at random. The maps bring the teacher to the student, so states that carry nothing would make the
    second term zero; D is what holds against that.
    Cost a position: 6 L_T d_T d_S FLOPs of the maps and 3 L_S L_T d_S of the choice; bytes 4 (L_T + n L_S) d_S.

    Raises SmeltError for a layer that is not there, nearest above L_T, and a divergence that reads something else.

    Differs from the paper's code: its weights of the terms are fixed at 1 (there they are parameters that a GPU leaves at 1
    and a CPU trains, even below 0). One map per teacher layer, shared by the student's layers, with a bias: reconstruction.
    The paper's student is a random model that reads in-distribution text only, its teacher one tuned on that text.
    """

    paper: ClassVar = Paper(
        "Multi-Level Knowledge Distillation for Out-of-Distribution Detection in Text", "arXiv:2211.11300", "its loss, as in its code"
    )
    zero_at_teacher: ClassVar = False
    layers: tuple[Annotated[int, Ge(1)], ...] = ()  # of the student; n is what block n leaves
    nearest: Annotated[int, Ge(1)] = 2
    divergence: Any = field(default_factory=ForwardKL)

    def __post_init__(self) -> None:
        token_divergence(self.divergence, "ood_layers: divergence")

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        if teacher is None:
            raise SmeltError("ood_layers needs a teacher; write 'teacher: NAME' in its train block")
        own, other = parts(student.model.config), parts(teacher.model.config)
        if self.layers and max(self.layers) > own.layers:
            raise SmeltError(f"ood_layers: layer {max(self.layers)} of the student, which has {own.layers}")
        if self.nearest > other.layers:
            raise SmeltError(f"ood_layers: nearest={self.nearest}, but the teacher has {other.layers} layers")
        return _Maps(self.layers or middle(own.layers), [nn.Linear(other.hidden, own.hidden) for _ in range(other.layers)])

    def __call__(
        self,
        student: Tensor,
        teacher: Tensor,
        student_hidden: tuple[Tensor, ...],
        teacher_hidden: tuple[Tensor, ...],
        equipment: Any,
    ) -> Tensor:
        states = [wide(linear(h.detach())) for linear, h in zip(equipment.maps, teacher_hidden[1:], strict=True)]
        mapped = torch.stack(states)  # [L_T, b, t, d]
        total = self.divergence(student=student, teacher=teacher)
        for at in equipment.layers:
            total = total + least(mapped, wide(student_hidden[at]), self.nearest)
        return total


class _Maps(nn.Module):
    """A map of each of the teacher's layers to the student's width, and the student's layers that learn."""

    def __init__(self, layers: tuple[int, ...], maps: list[nn.Linear]):
        super().__init__()
        self.layers, self.maps = layers, nn.ModuleList(maps)


def middle(layers: int) -> tuple[int, ...]:
    first = max(1, layers // 4)
    return tuple(range(first, max(first, 3 * layers // 4) + 1))


def least(mapped: Tensor, state: Tensor, count: int) -> Tensor:
    """Sum of the `count` smallest mean squares of mapped [n, ..., d] - state [..., d], chosen for every [...] by itself.

    Chosen without a graph and computed again for the chosen: `count` instead of n differences are kept for backward.
    """
    with torch.no_grad():
        far = torch.stack([(one - state).square().mean(-1) for one in mapped])
        chosen = far.topk(count, 0, largest=False).indices
    near = mapped.gather(0, chosen[..., None].expand(*chosen.shape, mapped.shape[-1]))
    return (near - state).square().mean(-1).sum(0)
