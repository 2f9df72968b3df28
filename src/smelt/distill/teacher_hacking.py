"""Is the student still learning the truth, or already the teacher's faults? Looks at both while an objective trains it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from smelt.distill import Procedure
from smelt.distill._holding import reading
from smelt.distill._teacher import agree, named
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import load
from smelt.model._walk import multiplied
from smelt.spec import Paper, SmeltError

__all__ = ["TeacherHacking"]

CURVES = ("train_proxy", "held_proxy", "golden")


@dataclass(frozen=True)
class TeacherHacking(Procedure):
    """proxy = KL(teacher || student), golden = KL(oracle || student); hacking iff golden rises while the training proxy falls.

    Trains by `objective` and looks at the student at step 0, after every share `every` of the training and at its end:
    train_proxy on the first `rows` rows of the training, held_proxy and golden on `rows` rows of the validation split, each
    a mean over all positions, in nats per token. Hacking: the last golden is above the least one by `rise` or more, and
    the last train_proxy is below that at the look of the least golden. Then the log's "warnings" say so. They also say when
    the teacher is farther from the oracle than the student was before it started: golden may then rise without any hacking.

    `source="fixed"`: the training sees the first `distinct` rows only, again and again; "fresh": new rows throughout.
    `oracle` is a model (folder, hub id, "embedded") of the student's tokenizer that stands for the truth. None: the teacher
    does, and golden is held_proxy, so that the verdict is plain overfitting. Returns the log with "curves" {step, train_proxy,
    held_proxy, golden} and "teacher_golden", KL(oracle || teacher). Looks are on the disk as they are made: a killed
    run neither loses nor repeats one, and trains as if nobody looked.

    Cost: per look two passes of student and teacher and one of the oracle over `rows` rows, counted in "flops"; memory: the
    oracle's weights.
    Raises SmeltError for an oracle of another vocabulary, sharded weights, and a cached teacher.

    Differs from the paper: distances are over given text, not over samples of oracle and teacher; `rise` is ours, as the
    paper reads its curves by eye; the power law that a healthy proxy follows is not fitted.
    """

    paper: ClassVar = Paper("On Teacher Hacking in Language Model Distillation", "arXiv:2502.02671", "golden and proxy metrics")
    objective: Any = field(default_factory=ForwardKL)
    oracle: str | None = None
    every: Annotated[float, Interval(gt=0, le=1)] = 0.1  # share of the training between two looks
    source: Literal["fixed", "fresh"] = "fresh"
    distinct: Annotated[int, Ge(1)] = 96  # rows of a fixed source
    rows: Annotated[int, Ge(1)] = 32  # rows of a look
    rise: Annotated[float, Gt(0)] = 0.1  # nats per token by which golden must rise

    def __post_init__(self) -> None:
        if isinstance(self.objective, Procedure) or not reading(self.objective):
            what = str(self.objective)[:60]
            raise SmeltError(f"teacher_hacking: it watches a training by an objective, such as forward_kl(); {what} is none")

    def teach(self, course: Any) -> dict[str, Any]:
        asked, student, teacher = course.settings, course.student, course.teacher
        if course.fsdp or asked.shard == "fsdp2":
            raise SmeltError("teacher_hacking: a look needs the student's whole weights; leave out 'shard: fsdp2'")
        if named(asked.teacher)[1] is not None:
            raise SmeltError("teacher_hacking: the teacher is asked about rows of its own at every look, so leave out 'cache'")
        width = agree(student, teacher, ("teacher",))
        oracle = teacher if self.oracle is None else load(self.oracle)
        agree(student, oracle, ("teacher",))
        rows = Repeated(course.rows(), self.distinct) if self.source == "fixed" else course.rows()
        held = course.rows(course.read(split="validation"))
        part, looks = asked.micro or asked.batch, course.journal("looks")
        first = int(os.environ.get("RANK", "0")) == 0

        def look(step: int) -> None:
            if not first or str(step) in looks:
                return
            train = distances(student.model, (teacher.model,), rows, self.rows, part, width)
            rest = distances(student.model, (teacher.model, oracle.model), held, self.rows, part, width)
            looks.put(str(step), dict(zip(CURVES, train + rest, strict=True)))

        if first and "teacher" not in looks:
            apart = 0.0 if self.oracle is None else distances(teacher.model, (oracle.model,), held, self.rows, part, width)[0]
            looks.put("teacher", apart)
        steps = [0, *sorted({max(1, round(k * self.every * asked.steps)) for k in range(1, int(1 / self.every) + 1)} | {asked.steps})]
        look(0)
        due = set(steps)
        log = course.fit(self.objective, rows=rows, after=lambda step, loss: look(step) if step in due else None)
        if not first:
            return log
        curves = {"step": steps} | {name: [looks[str(step)][name] for step in steps] for name in CURVES}
        passes = 2 * multiplied(student.model) + 2 * multiplied(teacher.model) + multiplied(oracle.model)
        log["flops"] += 2 * passes * asked.context * self.rows * len(steps)
        said = [text for text in (verdict(curves, self.rise), outside(curves, looks["teacher"])) if text]
        return log | {"curves": curves, "teacher_golden": looks["teacher"], "warnings": log["warnings"] + said}

    @classmethod
    def example(cls) -> Self:
        return cls(every=0.34, rows=3, source="fixed", distinct=5)


class Repeated(Dataset):
    """The first `distinct` rows of `rows`, over and over, as long as `rows` is."""

    def __init__(self, rows: Any, distinct: int):
        self.rows, self.distinct = rows, distinct

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index % self.distinct]


@torch.no_grad()
def distances(student: Any, others: tuple[Any, ...], rows: Any, count: int, part: int, width: int) -> list[float]:
    """Mean KL(other || student) of each of the others over the first `count` rows, nats per token. The student stays as it is."""
    training, device = student.training, student.device
    student.eval()
    sums, positions, count = [0.0] * len(others), 0, min(count, len(rows))
    for at in range(0, count, part):
        inputs = default_collate([rows[i] for i in range(at, min(count, at + part))])
        extra = {"position_ids": inputs["position_ids"].to(device)} if "position_ids" in inputs else {}
        ids = inputs["input_ids"].to(device)
        mine = student(input_ids=ids, use_cache=False, **extra).logits[..., :width]
        for which, other in enumerate(others):
            theirs = other.to(device).eval()(input_ids=ids, use_cache=False, **extra).logits[..., :width]
            sums[which] += ForwardKL()(mine, theirs).double().sum().item()
        positions += ids.numel()
    student.train(training)
    return [total / positions for total in sums]


def verdict(curves: dict[str, list[Any]], rise: float) -> str | None:
    """What to say of curves that part: see the class. None when they do not."""
    golden, proxy, step = curves["golden"], curves["train_proxy"], curves["step"]
    least = min(range(len(golden)), key=golden.__getitem__)
    if golden[-1] < golden[least] + rise or proxy[-1] >= proxy[least]:
        return None
    return (
        f"teacher hacking: from step {step[least]} to {step[-1]} the student went from {golden[least]:.3f} to {golden[-1]:.3f} nats per "
        f"token away from the oracle, while it came nearer to the teacher on its training rows ({proxy[least]:.3f} to {proxy[-1]:.3f})"
    )


def outside(curves: dict[str, list[Any]], teacher: float) -> str | None:
    """A teacher that has nothing to teach about the oracle."""
    start = curves["golden"][0]
    if teacher < start:
        return None
    return f"the teacher is {teacher:.3f} nats per token from the oracle and the student was {start:.3f} before it learned from it"
