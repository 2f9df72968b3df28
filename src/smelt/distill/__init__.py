"""Objectives that teach a student from a teacher, and plain training beside them.

An objective is a pure function of tensors. It says what it reads by the names of its call's parameters, and the
training loop hands over just that:

    student   [..., v]  logits of the student          teacher   [..., v]  logits of the teacher, no gradient
    labels    [...]     the next token                 keep      [...]     bool, the positions that count
    progress  float     share of the training done, 0 to 1
    student_hidden, teacher_hidden   tuple of [b, t, d], index 0 the embedding, the last after the final norm

It returns one loss per position, in nats, of shape [...]. The loop sums it over the positions kept in the whole
effective batch (all ranks, all accumulation steps) and divides by their number, so no objective ever averages
and padding never counts. A loss of a whole batch returns its scalar expanded to [...].

`...` is any leading shape: an objective that reads neither `keep` nor hidden states may be called on slices of the
positions, which is how the loop bounds the memory of large vocabularies.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

__all__ = ["READS", "Objective"]

READS = ("student", "teacher", "labels", "keep", "progress", "student_hidden", "teacher_hidden")


class Objective(Protocol):
    """Cost, range and what is zero at teacher = student are stated by each file."""

    def __call__(self, *tensors: Tensor) -> Tensor: ...
