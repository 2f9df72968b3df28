"""A teacher that has learned which of its examples this student learns from writes the training set."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Gt

from smelt import registry
from smelt.distill import Procedure
from smelt.distill._examples import Batches, Epochs, Pair, encode, likelihood, paired, read_examples, shuffled
from smelt.distill._preferring import Preferring, preferring
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._load import Loaded
from smelt.model._walk import parts
from smelt.recipe import Training
from smelt.spec import Paper, SmeltError

__all__ = ["ARTE"]

TOGETHER = 32  # prompts answered at once


@dataclass(frozen=True)
class ARTE(Procedure):
    """teacher' = argmin of preference(best draft, worst draft), best = argmax_d mean over (x, y) of log q_S(y | prompt, d, x) / |y|.

    Four steps. The teacher answers `prompts` prompts `drafts` times each, drawn at `temperature`, `new` tokens at most. A
    draft's score is how likely the student finds the outputs of `tests` preference examples with prompt and draft as the
    one demonstration before them, in nats per token. A copy of the teacher learns best against worst with `preference`,
    an objective of the family align, for `passes` passes over these pairs (AdamW, learning rate `teacher_lr`, batches of
    the train block). It then answers `samples` prompts, and the student learns these answers by cross-entropy for all the steps.
    drafts = 1: nothing is compared and the teacher stays as it is: the baseline, distilled text without the alignment.

    `examples`: a .jsonl file with `input` and `output`; `tests` of its rows, drawn at random, are the preference examples,
    the inputs of the rest are prompts. examples = "": a piece of the corpus, a quarter of the context, is a prompt, and
    the next piece the output.
    Teacher and student exchange text, so their tokenizers may differ. Every draft and score is kept on disk.

    Cost: prompts * drafts + samples answers of the teacher, prompts * drafts * tests forwards of the student, 2 forwards
    and a backward of the teacher per pair; `flops` in the log counts the trainings only. Memory: two copies of the teacher. Raises
    SmeltError for rows it cannot read (file:line), too few of them, a batch or micro that is odd, a context that is too short.

    Differs from the paper (simple form): questions are given, only their answers are drafted; the score is a mean
    log-probability, not one-shot accuracy, which is nearly always 0 for a small student; no choice of discriminating
    preference questions; plain prompts. Numbers of drafts and samples are ours (reconstruction).
    """

    paper: ClassVar = Paper(
        "Aligning Teacher with Student Preferences for Tailored Training Data Generation", "arXiv:2406.19227", "section 3"
    )
    preference: Any = field(default_factory=lambda: registry.parse("dpo", "align"))
    examples: str = ""
    prompts: Annotated[int, Ge(1)] = 64
    drafts: Annotated[int, Ge(1)] = 4
    tests: Annotated[int, Ge(1)] = 16
    samples: Annotated[int, Ge(1)] = 256
    new: Annotated[int, Ge(1)] = 128
    temperature: Annotated[float, Gt(0)] = 1.0
    passes: Annotated[int, Ge(1)] = 2
    teacher_lr: Annotated[float, Gt(0)] = 1e-4

    def __post_init__(self) -> None:
        preferring(self.preference, "arte: preference")

    @classmethod
    def example(cls) -> Self:
        return cls(prompts=4, drafts=2, tests=2, samples=8, new=6)

    def teach(self, course: Any) -> dict[str, Any]:
        settings, teacher, student = course.settings, course.teacher, course.student
        if teacher is None:
            raise SmeltError("arte: it trains a teacher and there is none; write 'teacher: NAME' in its train block")
        tests, prompts = self._from_file(course) if self.examples else self._from_text(course)
        new = self.new if self.examples else min(self.new, settings.context // 4)
        log: dict[str, Any] = {"flops": 0}
        warnings: list[str] = []
        aligned: Loaded = teacher
        pairs: list[tuple[list[int], list[int], list[int]]] = []
        if self.drafts > 1:
            asked = [text for text in prompts[: self.prompts] for _ in range(self.drafts)]
            drafted = self._said(course, teacher, "drafts", asked, new)
            scores = self._scores(course, asked, drafted, tests)
            for at in range(0, len(asked), self.drafts):
                part = range(at, at + self.drafts)
                best, worst = max(part, key=scores.__getitem__), min(part, key=scores.__getitem__)
                if drafted[best] != drafted[worst]:
                    pairs.append((encode(teacher.tokenizer, asked[at]), drafted[best], drafted[worst]))
            if pairs:
                aligned = Loaded(copy.deepcopy(teacher.model), teacher.tokenizer, teacher.folder)
                log = self._align(course, aligned, teacher, pairs)
            else:
                warnings.append("arte: the drafts of every prompt are alike, so the teacher was not aligned")
        asked = [prompts[at % len(prompts)] for at in range(self.samples)]
        length = self.new if self.examples else settings.context - settings.context // 4
        answers = self._said(course, aligned, "samples", asked, length)  # of the corpus: whole rows
        made = [_learned(student, teacher, prompt, ids, settings.context + 1) for prompt, ids in zip(asked, answers, strict=True)]
        found = [pair for pair in made if pair is not None]
        if not found:
            raise SmeltError(f"arte: none of the teacher's {len(asked)} answers has text that fits a context of {settings.context} tokens")
        if lost := len(made) - len(found):
            warnings.append(f"arte: {lost} of {len(made)} answers are empty or longer than the context, and left out")
        rows = shuffled(found, settings, course.seed, student.tokenizer.eos_token_id)
        about = course.fit(CrossEntropy(), rows=rows, name="student")
        figures = {"pairs": len(pairs), "samples": len(found)}
        return about | {"flops": about["flops"] + log["flops"], "warnings": about["warnings"] + warnings, "report": figures}

    def _from_file(self, course: Any) -> tuple[list[Pair], list[str]]:
        rows, encoder = read_examples(self.examples, ("input", "output")), course.student.tokenizer
        if len(rows) <= self.tests:
            raise SmeltError(
                f"arte: {len(rows)} rows, of which {self.tests} are preference examples: no prompt is left", file=self.examples
            )
        order = Epochs(len(rows), course.seed)
        mixed = [rows[order.at(i)] for i in range(len(rows))]
        tests = [Pair(encode(encoder, row["input"] + "\n"), encode(encoder, row["output"])) for row in mixed[: self.tests]]
        return tests, [row["input"] + "\n" for row in mixed[self.tests :]]

    def _from_text(self, course: Any) -> tuple[list[Pair], list[str]]:
        windows, unit = course.rows(), course.settings.context // 4
        if unit < 2:
            raise SmeltError(f"arte: a context of {course.settings.context} tokens is too short for a demonstration and an example")
        ids = [windows[i]["input_ids"].tolist() for i in range(self.tests + max(self.prompts, self.samples))]
        tests = [Pair(row[:unit], row[unit : 2 * unit]) for row in ids[: self.tests]]
        return tests, [course.student.tokenizer.decode(row[:unit]) for row in ids[self.tests :]]

    def _said(self, course: Any, loaded: Loaded, name: str, texts: Sequence[str], new: int) -> list[list[int]]:
        """An answer to each prompt in the teacher's ids, the end of text included where it came to it."""
        journal, end = course.journal(name), loaded.tokenizer.eos_token_id
        ids = [encode(loaded.tokenizer, text) or [end] for text in texts]
        room = parts(loaded.model.config).context
        if (longest := max(map(len, ids)) + new) > room:
            raise SmeltError(f"arte: prompt and answer take {longest} tokens, and the teacher has {room} positions; lower 'new'")
        order, at = sorted(range(len(ids)), key=lambda i: len(ids[i])), 0
        answers: list[list[int]] = [[] for _ in ids]
        with course.generating(loaded) as generate:
            while at < len(order):
                size = len(ids[order[at]])
                part = [i for i in order[at : at + TOGETHER] if len(ids[i]) == size]
                if (key := str(at)) not in journal:
                    asked = torch.tensor([ids[i] for i in part], device=loaded.model.device)
                    made = generate(asked, new, self.temperature, course.seed + 7919 * (at + 1))[:, size:].tolist()
                    journal.put(key, [row[: row.index(end) + 1] if end in row else row for row in made])
                for i, answer in zip(part, journal[key], strict=True):
                    answers[i] = answer
                at += len(part)
        return answers

    def _scores(self, course: Any, prompts: Sequence[str], drafted: Sequence[list[int]], tests: Sequence[Pair]) -> list[float]:
        """Of each draft: the student's mean log-probability of the tests' outputs after it, nats per token."""
        journal, decode = course.journal("scores"), course.teacher.tokenizer.decode
        scores = []
        for at, (prompt, ids) in enumerate(zip(prompts, drafted, strict=True)):
            if (key := str(at)) not in journal:
                shown = encode(course.student.tokenizer, f"{prompt}{decode(ids, skip_special_tokens=True)}\n\n")
                # too long: the demonstration loses its beginning
                pairs = [Pair([*shown, *x][-max(1, course.settings.context - len(y)) :], y) for x, y in tests]
                found = likelihood(course.student, pairs) / torch.tensor([len(y) for _, y in tests])
                journal.put(key, found.mean().item())
            scores.append(journal[key])
        return scores

    def _align(
        self, course: Any, aligned: Loaded, teacher: Loaded, pairs: Sequence[tuple[list[int], list[int], list[int]]]
    ) -> dict[str, Any]:
        """Train `aligned` to prefer the best drafts to the worst; the teacher is the reference."""
        asked = course.settings
        for name, rows in (("batch", asked.batch), ("micro", asked.micro)):
            if rows % 2:
                raise SmeltError(f"arte: a pair is two rows, so {name}={rows} must be even")
        steps, room = -(-len(pairs) * self.passes * 2 // asked.batch), asked.context + 1
        changes: dict[str, Any] = {"tokens": steps * asked.batch * asked.context, "lr": self.teacher_lr, "optimizer": "adamw"}
        own: Training = replace(asked, **changes, teacher=None)
        order = Epochs(len(pairs), course.seed)

        def make(step: int) -> list[tuple[list[int], int]]:
            rows = []
            for at in range(asked.batch // 2):
                prompt, *both = pairs[order.at(step * asked.batch // 2 + at)]
                kept = (prompt or [teacher.tokenizer.eos_token_id])[-max(1, room - max(map(len, both))) :]
                rows += [((kept + draft)[:room], len(kept)) for draft in both]
            return rows

        objective = Preferring(self.preference)
        batches = Batches(make, lambda lengths: [2 * sum(lengths) / len(lengths)] * len(lengths), own, teacher.tokenizer.eos_token_id)
        how: dict[str, Any] = {"settings": own, "pupil": aligned, "teachers": (teacher,), "change": objective.change, "name": "align"}
        return course.fit(objective, rows=batches, **how)


def _learned(student: Loaded, teacher: Loaded, prompt: str, ids: list[int], room: int) -> Pair | None:
    """An answer of the teacher in the student's ids; one that did not come to its end has no end of text, and may be cut."""
    text = teacher.tokenizer.decode(ids, skip_special_tokens=True)
    if not text or ids[-1:] == [teacher.tokenizer.eos_token_id]:
        return paired(student.tokenizer, prompt, text, room) if text else None
    before = (encode(student.tokenizer, prompt) or [student.tokenizer.eos_token_id])[-(room // 2) :]
    return Pair(before, encode(student.tokenizer, text)[: room - len(before)])
