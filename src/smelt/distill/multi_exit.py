"""Train several depths of one model at once, so that it may be cut off, or stop early, at any of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import linear

from smelt.distill import Equipped
from smelt.distill._holding import reading, token_divergence
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._load import Loaded
from smelt.model._walk import parts, stack
from smelt.spec import Paper, SmeltError

__all__ = ["MultiExit"]


@dataclass(frozen=True)
class MultiExit(Equipped):
    """loss = sum_i (i / L) [loss_i + [i < L] D(sg z_L, z_i)], z_i = head(norm(h_i)), nats per position; i runs over the exits of L blocks.

    Exit i is the model without the blocks after i: the final norm and the head are shared, so it equals the truncated model bit
    for bit and nothing is added. `objective` is what every exit learns (what reads student and labels only). D is
    `to_last`, a divergence such as forward_kl() in which the last exit, without gradient, teaches the earlier ones; none by
    default. exits=[] are a quarter, a half, three quarters and all of the blocks (rounded up).

    Shapes: student [b, t, v] (the last exit), student_hidden: tuple of [b, t, d], labels [b, t], student_head [v, d] -> [b, t].
    No teacher is read. Gradient: that of each exit's loss, times i / L; blocks up to an exit learn from all exits behind them.
    The sum is not divided by the sum of weights, so it is larger than the loss of a single exit.
    Cost: 6 d v FLOPs a position and exit besides the last; their logits and gradients stay until backward, 8 v bytes a position and exit.

    Raises SmeltError for an exit beyond the model, a model that bends or scales its logits after the head (gemma2), and
    objectives that read something else.

    Differs from the paper: the loss of an exit is next-token cross-entropy (there masked tokens and a same-repository
    classifier); no embedding of the exit's number, which would make an exit differ from the truncated model; `to_last`
    is ours (the paper has no divergence between exits); its exits are 4, 9, 18, 27 and 36 of 36.
    """

    paper: ClassVar = Paper(
        "MoSE: Hierarchical Self-Distillation Enhances Early Layer Embeddings", "arXiv:2503.03008", "the multi-exit loss"
    )
    exits: tuple[Annotated[int, Ge(1)], ...] = ()
    objective: Any = field(default_factory=CrossEntropy)
    to_last: Any = None

    def __post_init__(self) -> None:
        if not (names := reading(self.objective)) or not {"student"} <= set(names) <= {"student", "labels"}:
            what = type(self.objective).__name__ + (f", which reads {', '.join(names)}" if names else "")
            raise SmeltError(f"multi_exit: objective is {what}; an objective of student and labels is expected, such as cross_entropy()")
        if self.to_last is not None:
            token_divergence(self.to_last, "multi_exit: to_last")

    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module:
        config = student.model.config
        for name, plain in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
            if getattr(config, name, None) not in (None, plain):
                raise SmeltError(f"multi_exit: {config.model_type} models bend their logits after the head ({name}); that is not supported")
        norm = getattr(stack(student.model), "norm", None)
        if norm is None:
            raise SmeltError(f"multi_exit: {config.model_type} models have no final norm where smelt looks for it")
        return _Exits(norm, places(self.exits, parts(config).layers))

    def __call__(self, student: Tensor, student_hidden: tuple[Tensor, ...], labels: Tensor, student_head: Tensor, equipment: Any) -> Tensor:
        last = len(student_hidden) - 1
        total = torch.zeros((), device=student.device)
        for at in equipment.exits:
            logits = student if at == last else linear(equipment.norm(student_hidden[at]), student_head)
            given = {"student": logits, "labels": labels}
            loss = self.objective(**{name: given[name] for name in reading(self.objective)})
            if self.to_last is not None and at < last:
                loss = loss + self.to_last(student=logits, teacher=student.detach())
            total = total + at / last * loss
        return total


class _Exits(nn.Module):
    """The student's own final norm (the same module: it is trained with the student), and where the exits are."""

    def __init__(self, norm: Any, exits: tuple[int, ...]):
        super().__init__()
        self.norm, self.exits = norm, exits


def places(exits: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """The exits in rising order, each once."""
    if exits and max(exits) > layers:
        raise SmeltError(f"multi_exit: an exit after block {max(exits)}, but the student has {layers} blocks")
    return tuple(sorted(set(exits) or {-(-layers * quarter // 4) for quarter in range(1, 5)}))
