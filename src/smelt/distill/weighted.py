"""Several objectives at once, each with its weight: soft targets beside the labels, or a divergence beside a representation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from annotated_types import Ge
from torch import Tensor, nn

from smelt.distill import READS, Composed, Equipped, Procedure, Stateful
from smelt.distill._holding import reading
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.spec import Paper, SmeltError, nearest

__all__ = ["Weighted"]


@dataclass(frozen=True)
class Weighted(Composed, Stateful):
    """loss = sum_i w_i loss_i at every position, nats per token where the objectives are; the weights need not sum to 1.

    Shapes: what the objectives read -> [...]. Gradient: the same sum. Cost: that of all objectives; a weight of 0 is computed
    too. Where all of them read `FLAT` names only, masked positions are dropped; one that does not has all computed on them.
    Zero at the teacher where every objective with a weight is. It reads what they read; `equipment` holds that of the
    objectives that have one, under their places "0", "1", ...; `after` goes to those with state, with the loss of the sum:
    in `weighted(objectives=[taid(), cross_entropy()])` the schedule of taid follows the total.

    Raises SmeltError for as many weights as there are not objectives, for a weight that is negative or not finite, for no
    positive weight, and for what is no objective (a procedure decides what is trained on: it holds objectives, not the
    other way round).

    Differs from the paper: it averages the cross-entropy with soft targets, at T with a factor T^2, and the one with the
    labels, with "considerably lower weight" for the second; here any objectives and 1/2 each.
    """

    paper: ClassVar = Paper("Distilling the Knowledge in a Neural Network", "arXiv:1503.02531", "section 2, weighted average")
    zero_at_teacher: ClassVar = False
    objectives: tuple[Any, ...] = (ForwardKL(), CrossEntropy())
    weights: tuple[Annotated[float, Ge(0)], ...] = (0.5, 0.5)

    def __post_init__(self) -> None:
        if len(self.objectives) != len(self.weights) or not self.objectives:
            raise SmeltError(f"weighted: {len(self.objectives)} objectives and {len(self.weights)} weights; write one weight for each")
        if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights) or not any(self.weights):
            raise SmeltError(f"weighted: weights={list(self.weights)}; finite numbers from 0 are expected, at least one above it")
        for place, objective in enumerate(self.objectives):
            names = () if isinstance(objective, Procedure) else reading(objective)
            if not names:
                raise SmeltError(f"weighted: objectives[{place}] is {objective!r:.60}; an objective is expected, such as forward_kl()")
            for name in names:
                if name not in READS:
                    what = f"weighted: objectives[{place}]: {type(objective).__name__} reads '{name}'"
                    raise SmeltError(f"{what}, which distillation does not supply{nearest(name, READS)}")

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for objective in self.objectives for name in reading(objective)))

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module | None:
        held = {str(i): one.equipment(student, teacher) for i, one in enumerate(self.objectives) if isinstance(one, Equipped)}
        return nn.ModuleDict({place: made for place, made in held.items() if made is not None}) if held else None

    def after(self, equipment: Any, loss: float, progress: float) -> None:
        for place, objective in enumerate(self.objectives):
            if isinstance(objective, Stateful) and equipment is not None and str(place) in equipment:
                objective.after(equipment[str(place)], loss, progress)

    def __call__(self, **tensors: Any) -> Tensor:
        total: Any = 0.0
        for place, (objective, weight) in enumerate(zip(self.objectives, self.weights, strict=True)):
            given = {name: tensors[name] for name in reading(objective)}
            if "equipment" in given:
                given["equipment"] = given["equipment"][str(place)]
            total = total + weight * objective(**given)
        return total
