"""A preference objective of the family align, taught by rows of text to a language model that has a reference beside it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from smelt.distill import Composed
from smelt.distill._divergence import wide
from smelt.spec import SmeltError

__all__ = ["Preferring", "preferring"]

PREFERENCE = ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")


def preferring(objective: Any, where: str) -> None:
    """Raises SmeltError unless `objective` reads log-probabilities of pairs of answers only."""
    names = tuple(inspect.signature(objective).parameters) if callable(objective) else ()
    if isinstance(objective, type) or not names or not set(names) <= set(PREFERENCE):
        raise SmeltError(f"{where}: {str(objective)[:60]} is no objective on pairs of answers; give one of the family align, such as dpo()")


class Preferring(Composed):
    """A preference objective on rows in pairs, chosen before rejected: its loss is spread over the tokens of the pair.

    It names `student_ids` although it does not use them: policy and reference are equal at first, as they should be, and
    the loop looks for that only where an objective reads nothing but logits and labels.
    """

    reads = ("student", "teacher", "labels", "keep", "student_ids")

    def __init__(self, preference: Any):
        self.preference, self.names = preference, tuple(inspect.signature(preference).parameters)
        self.weights = torch.ones(1)

    def change(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        self.weights = inputs["weights"]
        return inputs

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, keep: Tensor, student_ids: Tensor) -> Tensor:
        both = [_log_probability(logits, labels, keep) for logits in (student, teacher)]
        have = dict(zip(PREFERENCE, (both[0][::2], both[0][1::2], both[1][::2], both[1][1::2]), strict=True))
        loss = self.preference(**{name: have[name] for name in self.names}) / keep.view(len(keep) // 2, -1).sum(1)
        return (loss.repeat_interleave(2) * self.weights)[:, None].expand(labels.shape)


def _log_probability(logits: Tensor, labels: Tensor, keep: Tensor) -> Tensor:
    """Summed over the kept labels of each row, [b]."""
    loss = cross_entropy(wide(logits).flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
    return -torch.where(keep, loss, 0.0).sum(-1)
