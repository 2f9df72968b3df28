"""Say what the teacher says, and like the same demonstrations in the prompt as the teacher does."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Annotated, Any, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from smelt.distill import Composed, Procedure
from smelt.distill._divergence import wide
from smelt.distill._examples import Batches, Epochs, encode, read_examples
from smelt.distill._holding import token_divergence
from smelt.distill.forward_kl import ForwardKL
from smelt.spec import Paper, SmeltError

__all__ = ["BiAlign"]

Sample = tuple[list[list[int]], list[int], list[int]]  # demonstrations, input, output


@dataclass(frozen=True)
class BiAlign(Procedure):
    """L = mean_t D(p_t, q_t) + weight * mean_samples sum_{i preferred to j} max(0, Q_S(j) - Q_S(i) + margin * gap_ij / (n - 1)).

    A sample is a group of 1 + n rows: k demonstrations with an input and its output, on all of whose tokens the token
    `divergence` D is taken (nats per token), and the same input after n = `subsets` different subsets R_j of them. Q(R_j) is
    the mean log-probability of the output's tokens after R_j, Q_S of the student. i is preferred to j where the teacher's
    Q_T(i) > Q_T(j); gap_ij is the distance of their ranks, 1 to n - 1; equal ones are no pair. k is drawn from `least` to `most`.
    Gradient of Q_S: +1 for j and -1 for i of every pair whose hinge is open. The order of the subsets changes nothing.

    `examples`: a .jsonl file with the fields `input` and `output`. examples = "": the pieces of a window of the corpus, the
    last one being what is said after the others, its last quarter the output; the windows are those of forward_kl().

    Cost: n of n + 1 rows carry only the ranking, so at equal tokens D sees 1 / (n + 1) of the text. Demonstrations that
    do not fit the context are left away. Raises SmeltError when a step's rows are no whole groups (train: batch and
    micro are multiples of 1 + subsets), when there are fewer subsets than asked for, and for rows it cannot read (file:line).

    Differs from the paper: its constant of the margin was not legible; margin * gap / (n - 1) on length-normalised
    log-probabilities is a reconstruction, and so are subsets drawn alike from all that are not empty.
    """

    paper: ClassVar = Paper("Beyond Output Matching: Bidirectional Alignment for Enhanced In-Context Learning", "arXiv:2312.17055", "eq. 3")
    divergence: Any = field(default_factory=ForwardKL)
    examples: str = ""
    weight: Annotated[float, Ge(0)] = 1.0
    margin: Annotated[float, Ge(0)] = 0.1
    subsets: Annotated[int, Ge(2), Le(16)] = 4
    least: Annotated[int, Ge(2), Le(16)] = 4
    most: Annotated[int, Ge(2), Le(16)] = 10

    def __post_init__(self) -> None:
        token_divergence(self.divergence, "bialign: divergence")
        if self.least > self.most:
            raise SmeltError(f"bialign: least={self.least} is more than most={self.most}")
        if 2**self.least - 1 < self.subsets:
            raise SmeltError(f"bialign: {self.least} demonstrations have {2**self.least - 1} subsets, not {self.subsets}; raise 'least'")

    @classmethod
    def example(cls) -> Self:
        return cls(subsets=3, least=2, most=3)

    def teach(self, course: Any) -> dict[str, Any]:
        settings, group = course.settings, 1 + self.subsets
        together = settings.micro or math.ceil(settings.batch / int(os.environ.get("WORLD_SIZE", "1")))
        for name, rows in (("batch", settings.batch), ("micro", together)):
            if rows % group:
                raise SmeltError(f"bialign: {name}={rows} is not a multiple of the {group} rows of a sample (1 + subsets)")
        source = self._from_file(course) if self.examples else self._from_text(course)

        def make(step: int) -> list[tuple[list[int], int]]:
            per_step = settings.batch // group
            return [row for at in range(per_step) for row in self._group(source, course.seed, step * per_step + at)]

        def weigh(lengths: list[int]) -> list[float]:
            tokens, whole = sum(lengths), sum(lengths[::group])
            return [tokens / whole if at % group == 0 else tokens * group / len(lengths) for at in range(len(lengths))]

        rows = Batches(make, weigh, settings, course.student.tokenizer.eos_token_id)
        return course.fit(_Both(self), rows=rows)

    def _group(self, source: Callable[[int, np.random.Generator], Sample], seed: int, index: int) -> list[tuple[list[int], int]]:
        """The rows of one sample: (ids, where those that count begin)."""
        made = np.random.default_rng([seed, index])
        demonstrations, before, said = source(index, made)
        taken = made.choice(2 ** len(demonstrations) - 1, self.subsets, replace=False) + 1
        rows = [([*chain(*demonstrations), *before, *said], 1)]
        for code in taken.tolist():
            kept = [*chain(*(part for at, part in enumerate(demonstrations) if code >> at & 1))]
            rows.append(([*kept, *before, *said], len(kept) + len(before)))
        return rows

    def _from_text(self, course: Any) -> Callable[[int, np.random.Generator], Sample]:
        windows, length = course.rows(), course.settings.context + 1
        if length // (self.most + 1) < 2:
            raise SmeltError(f"bialign: {self.most + 1} pieces of a row of {length - 1} tokens have no room for input and output")

        def source(index: int, made: np.random.Generator) -> Sample:
            row = windows[index]
            ids = [*row["input_ids"].tolist(), int(row["labels"][-1])]
            count = int(made.integers(self.least, self.most + 1))
            size = length // (count + 1)
            parts = [ids[at * size : (at + 1) * size] for at in range(count)]
            last = ids[count * size :]
            cut = len(last) - max(1, len(last) // 4)
            return parts, last[:cut], last[cut:]

        return source

    def _from_file(self, course: Any) -> Callable[[int, np.random.Generator], Sample]:
        tokenizer, room = course.student.tokenizer, course.settings.context + 1
        texts = read_examples(self.examples, ("input", "output"))
        pairs = [(encode(tokenizer, row["input"] + "\n"), encode(tokenizer, row["output"] + "\n\n")) for row in texts]
        few = next(k for k in range(1, 17) if 2**k - 1 >= self.subsets)
        pairs = [(before, said) for before, said in pairs if (few + 1) * (len(before) + len(said)) <= room]
        if len(pairs) <= self.most:
            what = (
                f"bialign: {len(pairs)} rows are short enough for {few + 1} of them to fit {room - 1} tokens; most={self.most} needs more"
            )
            raise SmeltError(what, file=self.examples)
        order = Epochs(len(pairs), course.seed)

        def source(index: int, made: np.random.Generator) -> Sample:
            own = order.at(index)
            others = made.permutation(len(pairs) - 1)[: made.integers(self.least, self.most + 1)]
            before, said = pairs[own]
            left = room - len(before) - len(said)
            found: list[list[int]] = []
            shown = [[*chain(*pairs[at + (at >= own)])] for at in others.tolist()]
            # the shorter ones first when not all fit: then there are at least `few`, each being at most room / (few + 1)
            for part in shown if sum(map(len, shown)) <= left else sorted(shown, key=len):
                if len(part) <= left:
                    found, left = [*found, part], left - len(part)
            return found, before, said

        return source


class _Both(Composed):
    """The loss of whole groups of rows, weighed as `_examples.Weighed` does; the ranking is spread over the group's outputs."""

    reads = ("student", "teacher", "labels", "keep", "weights")

    def __init__(self, method: BiAlign):
        self.method = method

    def __call__(self, student: Tensor, teacher: Tensor, labels: Tensor, keep: Tensor, weights: Tensor) -> Tensor:
        group = 1 + self.method.subsets
        whole = torch.arange(len(labels), device=labels.device) % group == 0
        aligned = self.method.divergence(student=student[whole], teacher=teacher[whole])
        counts = keep & ~whole[:, None]
        liked, wanted = (_mean_log(logits, labels, counts).view(-1, group)[:, 1:] for logits in (student, teacher.detach()))
        ranked = self.method.weight * ranking(liked, wanted, self.method.margin)
        places = counts.view(-1, group * counts.shape[1]).sum(1)
        loss = (ranked / places).repeat_interleave(group)[:, None].expand(labels.shape)
        loss = loss.masked_scatter(whole[:, None].expand(loss.shape), aligned.to(loss.dtype))
        return loss * weights[:, None]


def _mean_log(logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    """Mean log-probability of the labels where they count, one per row; 0 for a row where none does."""
    found = wide(logits[counts]).log_softmax(-1).gather(-1, labels[counts][:, None])[:, 0]
    rows = counts.nonzero()[:, 0]
    total = torch.zeros(len(labels), dtype=found.dtype, device=found.device).index_add(0, rows, found)
    return total / counts.sum(1).clamp(min=1)


def ranking(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """sum over pairs of max(0, Q_S(j) - Q_S(i) + margin gap / (n - 1)), i the teacher's choice: [s, n], [s, n] -> [s]."""
    rank = (teacher[:, None, :] > teacher[:, :, None]).sum(-1)  # 0: the teacher likes none better
    gap = rank[:, None, :] - rank[:, :, None]  # [s, i, j]: by how many ranks i is before j
    hinge = (student[:, None, :] - student[:, :, None] + margin * gap.to(student.dtype) / (student.shape[1] - 1)).clamp(min=0)
    return torch.where(gap > 0, hinge, 0).sum((1, 2))
