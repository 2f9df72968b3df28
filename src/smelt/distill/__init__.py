"""Objectives that teach a student from a teacher, plain training beside them, and procedures that decide what is trained on.

An **objective** is a pure function of tensors. It says what it reads by the names of its call's parameters (or, made of
others, by `reads`), and the training loop hands over just that. Where `student_` stands there is `teacher_` too:

    student, teacher [b, t, v]   logits                student_hidden     tuple of [b, t, d]: embedding, ..., after the final norm
    teachers  tuple of [b, t, v], several              student_projected  tuple, per layer (q [b, t, h k], k [b, t, g k],
    labels [b, t]                the next token                           v [b, t, g k]), before rotary angles
    keep [b, t] bool             what counts           student_head, student_embedding [v, d]; weights [b], those of the rows or 1
    student_ids [b, t]           what is read          teacher_ids, teacher_labels, teacher_keep [b, s]: who reads `teacher_ids`
    progress  0 to 1, of the training                  takes a teacher of another tokenizer; it reads the same text, and
    equipment  what `Equipped.equipment` made          its tensors have its own positions

Teacher tensors carry no gradient. It returns one loss per position of the student, in nats, [b, t]. The loop sums it over
the positions kept in the whole effective batch (all ranks, all accumulation steps) and divides by their number, so
no objective averages and padding never counts. A loss of a whole batch returns its scalar expanded to [b, t].

An objective that reads names of `FLAT` only is called on the kept positions alone, [n, v]: it must take any leading shape.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from smelt.model._load import Loaded

__all__ = ["FLAT", "READS", "Composed", "Equipped", "Objective", "Procedure", "Stateful"]

FLAT = ("student", "teacher", "teachers", "labels", "progress", "equipment")
BOTH = ("hidden", "projected", "head", "embedding", "ids")
READS = (*FLAT, "keep", "weights", *(f"student_{x}" for x in BOTH), *(f"teacher_{x}" for x in BOTH), "teacher_labels", "teacher_keep")


class Objective(Protocol):  # each file states cost, range and what is zero at teacher = student (`zero_at_teacher: ClassVar[bool]`)
    def __call__(self, *tensors: Any) -> Tensor: ...


class Composed(ABC):
    """An objective made of others: `reads` are their names together, handed over as keywords."""

    @property
    @abstractmethod
    def reads(self) -> tuple[str, ...]: ...

    @property
    def silent(self) -> frozenset[int]:
        """The places in `teachers` that it never looks at: those are not asked, and None stands there."""
        return frozenset()


class Equipped(ABC):
    """An objective with parameters of its own (projectors, critics). The loop makes them once (seeded), trains them with the
    student's optimizer and schedule, saves them in every checkpoint; they never become a part of the student."""

    @abstractmethod
    def equipment(self, student: Loaded, teacher: Loaded | None) -> nn.Module | None: ...


class Stateful(Equipped):
    """An objective with state: buffers of its equipment that `after` changes."""

    @abstractmethod
    def after(self, equipment: nn.Module, loss: float, progress: float) -> None:
        """Called once after every optimizer step, with the loss of its whole effective batch (all ranks)."""


class Procedure(ABC):
    """A method that decides what is trained on, and when: samples, rounds, prompts. It drives a `smelt.train.Course`.

    `taught`: "model" (it reads a local teacher's tensors), "text" (it only asks for text: an endpoint will do), "no".
    """

    taught: ClassVar[str] = "model"

    @abstractmethod
    def teach(self, course: Any) -> dict[str, Any]:
        """Train `course.student` in place; returns what `course.fit` does, and more if there is more to say. A killed run
        calls it again: finished fits and given answers are there, so all else must follow from the course."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self: ...  # a small instance for the family's laws
