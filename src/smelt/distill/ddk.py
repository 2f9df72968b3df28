"""Train most where the student is furthest behind its teacher: domains are drawn by the ratio of their perplexities."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge, Interval
from torch import Tensor
from torch.utils.data import Dataset

from smelt.distill import Procedure
from smelt.distill._holding import reading
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.weighted import Weighted
from smelt.recipe import corpus
from smelt.spec import Paper, SmeltError

__all__ = ["DDK"]

HELD = 10  # without `domains`, a tenth of each part is held out


@dataclass(frozen=True)
class DDK(Procedure):
    """r[i] <- alpha psi[i] / sum psi + (1 - alpha) / N, psi[i] = r[i] exp(PPL_student[i] / PPL_teacher[i]); r = 1/N before all.

    Rows are drawn from domain i with probability r[i]; each is trained on by `objective`, by default
    -log q(x) + KL(p || q); other weights, temperatures and losses: objective=weighted(...), or cross_entropy() for none.
    PPL = exp(mean nats per token) on `rows` rows of the domain's held-out text. r is updated once before the training and
    once every `every` steps, in log space; alpha = 0 is uniform sampling, and r[i] >= (1 - alpha) / N always.

    `domains`: corpora, each with its own train and validation split (a method, or text as after `data:` in a recipe).
    Without any, the train split of the train block's data is cut, in its reading order and between documents, into `parts`
    of about equal length: neighbours in a folder fall together. A tenth of each part is then held out and not trained on.
    A domain that is used up starts again in another order. Rows follow from (seed, journal of r): a killed run goes on as it was.

    Cost: that of `objective`; N * rows forwards of the student for each update, and of the teacher once (not in
    `flops`). Memory: as of one training.

    Raises SmeltError for a cached teacher (the rows are not known before), several teachers, several processes, what
    is no objective or no corpus, a domain too short for a row.

    Differs from the paper: an update takes effect one step after its measurement, because the loader reads one batch
    ahead; the first r is smoothed like the others (there r0 ~ exp(ratio)). The weight 1 of KL, gamma, is a reconstruction: the
    text read does not give it. The paper's every is 1000, of about 30,000 steps.
    """

    paper: ClassVar = Paper("DDK: Distilling Domain Knowledge for Efficient Large Language Models", "arXiv:2407.16154", "sections 3.2-3.3")
    domains: tuple[Any, ...] = ()
    parts: Annotated[int, Ge(1)] = 4
    every: Annotated[int, Ge(2)] = 1000
    alpha: Annotated[float, Interval(ge=0, le=1)] = 0.5
    objective: Any = field(default_factory=lambda: Weighted(objectives=(CrossEntropy(), ForwardKL()), weights=(1.0, 1.0)))
    rows: Annotated[int, Ge(1)] = 32  # of a domain, for its perplexity

    def __post_init__(self) -> None:
        names, name = reading(self.objective), type(self.objective).__name__
        if not names or isinstance(self.objective, Procedure):
            raise SmeltError(f"ddk: {name} is no objective; write one such as weighted(objectives=[cross_entropy(), forward_kl()])")
        if "teachers" in names:
            raise SmeltError(f"ddk: {name} reads several teachers; perplexities are compared with those of one")
        for one in self.domains:
            corpus(one) if isinstance(one, str) else _is_corpus(one)

    @classmethod
    def example(cls) -> Self:
        return cls(parts=3, every=2, rows=4)

    def teach(self, course: Any) -> dict[str, Any]:
        if isinstance(course.settings.teacher, dict) and course.settings.teacher.get("cache"):
            raise SmeltError("ddk: which rows are drawn follows from the training, so a teacher cannot be cached; leave out 'cache'")
        if len(course.teachers) != 1:
            raise SmeltError(f"ddk learns from one teacher; the train block names {len(course.teachers)}")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SmeltError("ddk runs on one process: its journal has one writer")
        train, held = self._texts(course)
        journal = course.journal("ddk")

        def nats(who: Any) -> list[float]:
            return [course.loss(who, text, self.rows) for text in held]

        def update(number: int) -> None:
            """Measure and write down the probabilities of block `number`, unless an earlier run did."""
            if f"r{number}" not in journal:
                before = journal[f"r{number - 1}"]["r"] if number else [1 / len(held)] * len(held)
                student = nats(course.student)
                journal.put(f"r{number}", {"r": _updated(before, student, journal["teacher"], self.alpha), "student": student})

        def after(steps: int, loss: float) -> None:
            if (steps + 1) % self.every == 0 and steps + 1 < course.settings.steps:
                update((steps + 1) // self.every)

        if "teacher" not in journal:
            journal.put("teacher", nats(course.teacher))
        update(0)
        block = self.every * course.settings.batch
        drawn = _Drawn([course.rows(text) for text in train], journal, block, course.settings.steps * course.settings.batch, course.seed)
        log = course.fit(self.objective, rows=drawn, after=after)
        history = [journal[f"r{number}"] for number in range(len(journal) - 1)]
        return log | {"domains": {"teacher": journal["teacher"], "history": history}}

    def _texts(self, course: Any) -> tuple[list[Any], list[Any]]:
        """(what is trained on, what is measured on), one of each for every domain."""
        if self.domains:
            found = [corpus(one) if isinstance(one, str) else one for one in self.domains]
            return [course.read(one, "train") for one in found], [course.read(one, "validation") for one in found]
        whole, room = course.tokens, course.settings.context + 1
        ends = [int(whole.starts[np.abs(whole.starts - len(whole) * at // self.parts).argmin()]) for at in range(self.parts + 1)]
        train, held = [], []
        for low, high in itertools.pairwise(ends):
            cut = high - max(room, min(self.rows * course.settings.context + 1, (high - low) // HELD))
            if cut - low < 2 * room:
                raise SmeltError(f"ddk: parts={self.parts} of {len(whole)} tokens are too short for rows of {room - 1}; take fewer parts")
            train.append(_Part(whole, low, cut))
            held.append(_Part(whole, cut, high))
        return train, held


def _is_corpus(value: Any) -> None:
    if isinstance(value, type) or not callable(getattr(value, "documents", None)):
        raise SmeltError(f"ddk: domains: {value!r} is not a corpus; write a list such as [stdlib(), files(path='notes')]")


def _updated(r: list[float], student: list[float], teacher: list[float], alpha: float) -> list[float]:
    """The next probabilities, from nats per token of both models on every domain."""
    gap = np.minimum(np.array(student) - np.array(teacher), 700.0)  # its exp is a float
    log_psi = np.log(r) + np.exp(gap)
    psi = np.exp(log_psi - log_psi.max())
    return (alpha * psi / psi.sum() + (1 - alpha) / len(r)).tolist()


class _Part:
    """A stretch of a token stream, with the documents that start in it."""

    def __init__(self, whole: Any, low: int, high: int):
        self.ids = whole.ids[low:high]
        inside = whole.starts[(whole.starts > low) & (whole.starts < high)] - low
        self.starts = np.concatenate([[0], inside, [high - low]])

    def __len__(self) -> int:
        return len(self.ids)


class _Drawn(Dataset):
    """Row i is the next unread row of the domain that i draws; the k-th row drawn of a domain is its row k."""

    def __init__(self, domains: list[Any], journal: Any, block: int, count: int, seed: int):
        self.domains, self.journal, self.block, self.count, self.seed = domains, journal, block, count, seed
        self.plans: list[tuple[np.ndarray, np.ndarray]] = []  # of each block: domain and place in it of every row
        self.read = np.zeros(len(domains), np.int64)  # rows of each domain in those blocks

    def __len__(self) -> int:
        return self.count

    def plan(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        while len(self.plans) <= number:
            at = len(self.plans)
            r = np.array(self.journal[f"r{at}"]["r"])
            domain = np.random.default_rng([self.seed, at]).choice(len(r), self.block, p=r / r.sum())
            which = domain[:, None] == np.arange(len(r))
            place = (self.read + which.cumsum(0) - 1)[np.arange(self.block), domain]
            self.plans.append((domain, place))
            self.read = self.read + which.sum(0)
        return self.plans[number]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        domain, place = self.plan(index // self.block)
        at = index % self.block
        return self.domains[domain[at]][int(place[at])] | {"row": torch.tensor(index)}
