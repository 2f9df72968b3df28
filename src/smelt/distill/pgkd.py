"""A teacher that sees where the student fails writes the next examples, round by round."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from smelt.distill import Procedure
from smelt.distill._examples import encode, likelihood, paired, read_examples, share, shuffled
from smelt.distill._guidance import apportion, hard_negatives, joined, parsed, report
from smelt.distill._tasks import keywords, written
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["PGKD"]

Row = dict[str, str]


@dataclass(frozen=True)
class PGKD(Procedure):
    """data += teacher(report, right, wrong, hard); student = argmin_q of -log q(label | text) on data; again, at most `rounds` times.

    Classification of `text` into the `label`s of the .jsonl file `examples`: the student's answer is the label y with the
    largest log q(y, end of text | prompt), its confidence the softmax of those over the labels. A `held` share of the rows
    (by a hash of the text, so copies stay together) is for validation; there is no test split here and none is read. After a
    first training on the rest (the share `first` of all steps) each round has a like part of the steps left: the
    teacher gets the labels, the report (per label: rows, precision, recall, F1), `shown` rows answered right, as many
    answered wrong, and as many hard negatives (training rows answered wrong, the most confident first), and writes `samples` new rows,
    JSON lines of text and label. Rows with an unknown label, seen before or in the validation part are left out.
    It ends after `patience` rounds without a better validation accuracy; the best student is what remains.

    examples = "": `count` keyword texts of eight labels, made by a program. writes = "program", with these only: the program is
    the teacher too, and gives each label a part of `samples` in proportion to its errors in the report and among the hard
    negatives, targeted = False: all labels the same (the paper's loop without its guidance).

    Cost: that of cross_entropy on the same positions; labels * rows forwards per round; one answer of the teacher per
    round. Raises SmeltError for rows it cannot read (file:line), one label, no validation row, a prompt that does not fit a local teacher.

    Differs from the paper: a language model that is asked for the likelihood of label texts, not BERT with a
    classifier; a fixed share of the steps per round for training to convergence. From a summary of the paper: the
    words of the prompt and the program's apportionment are reconstructions.
    """

    paper: ClassVar = Paper(
        "Performance-Guided LLM Knowledge Distillation for Efficient Text Classification at Scale", "arXiv:2411.05045", "section 3"
    )
    examples: str = ""
    writes: Literal["teacher", "program"] = "teacher"
    targeted: bool = True
    rounds: Annotated[int, Ge(1)] = 10
    patience: Annotated[int, Ge(1)] = 5
    samples: Annotated[int, Ge(1)] = 32
    shown: Annotated[int, Ge(0)] = 16
    held: Annotated[float, Gt(0), Lt(1)] = 0.2
    first: Annotated[float, Gt(0), Lt(1)] = 0.5
    count: Annotated[int, Ge(8), Le(4000)] = 1000
    new: Annotated[int, Ge(1)] = 2048
    temperature: Annotated[float, Ge(0)] = 1.0

    def __post_init__(self) -> None:
        if self.writes == "program" and self.examples:
            raise SmeltError("pgkd: writes='program' knows the built-in texts only; leave 'examples' out, or let the teacher write")
        if not self.targeted and self.writes == "teacher":
            raise SmeltError("pgkd: targeted=False is said of writes='program'; a teacher is always shown the report")

    @property
    def taught(self) -> str:  # type: ignore[override]
        return "text" if self.writes == "teacher" else "no"

    @classmethod
    def example(cls) -> Self:
        return cls(writes="program", rounds=1, first=0.7, samples=4, count=40)

    def teach(self, course: Any) -> dict[str, Any]:
        rows = read_examples(self.examples, ("text", "label")) if self.examples else keywords(self.count, course.seed)
        labels = sorted({row["label"] for row in rows})
        apart = [share(row["text"]) < self.held for row in rows]
        data, validation = ([row for row, out in zip(rows, apart, strict=True) if out is side] for side in (False, True))
        if len(labels) < 2 or not data or not validation:
            raise SmeltError(f"pgkd: {len(labels)} labels, {len(data)} training and {len(validation)} validation rows are too few")
        steps, model = course.settings.steps, course.student.model
        if steps <= self.rounds:
            raise SmeltError(f"pgkd: {steps} steps are too few for a first training and {self.rounds} rounds; more tokens, or fewer rounds")
        opening = min(max(1, round(self.first * steps)), steps - self.rounds)
        each = (steps - opening) // self.rounds
        logs = [self._fit(course, data, labels, opening, "round-0")]
        curve: list[float] = []
        warnings: list[str] = []
        state: dict[str, Tensor] = {}
        best, still, added = -1.0, 0, 0
        for at in range(1, self.rounds + 2):
            says, _ = _answers(course.student, validation, labels)
            right = sum(said == row["label"] for said, row in zip(says, validation, strict=True)) / len(validation)
            curve.append(right)
            still = 0 if right > best else still + 1
            if right > best:
                best, state = right, copy.deepcopy(model.state_dict())
            if at > self.rounds or still >= self.patience:
                break
            about, gaps = report(says, validation, labels)
            fresh, refused = self._written(course, at, data, validation, labels, about, gaps)
            if refused:
                warnings.append(f"pgkd: round {at}: {refused} of the teacher's lines are no new rows")
            data, added = data + fresh, added + len(fresh)
            logs.append(self._fit(course, data, labels, each, f"round-{at}"))
        model.load_state_dict(state)
        figures = {"accuracy": best, "accuracy_by_round": curve, "rounds": len(curve) - 1, "written": added}
        return joined(logs) | {"report": figures, "warnings": [text for log in logs for text in log["warnings"]] + warnings}

    def _fit(self, course: Any, data: list[Row], labels: list[str], steps: int, name: str) -> dict[str, Any]:
        settings, tokenizer = course.settings, course.student.tokenizer
        made = [paired(tokenizer, _prompt(row["text"]), row["label"], settings.context + 1) for row in data]
        pairs = [pair for pair in made if pair is not None]
        if not pairs:
            raise SmeltError(f"pgkd: no label fits into a context of {settings.context} tokens")
        own = replace(settings, tokens=steps * settings.batch * settings.context)
        rows = shuffled(pairs, own, course.seed, tokenizer.eos_token_id)
        return course.fit(CrossEntropy(), rows=rows, settings=own, name=name)

    def _written(
        self, course: Any, at: int, data: list[Row], validation: list[Row], labels: list[str], about: str, gaps: dict[str, int]
    ) -> tuple[list[Row], int]:
        """(the new rows of a round, how many lines were none)."""
        says, sure = _answers(course.student, data, labels)
        right = [row for said, row in zip(says, data, strict=True) if said == row["label"]][: self.shown]
        order = hard_negatives(says, sure.tolist(), data)
        wrong = [row for said, row in zip(says, data, strict=True) if said != row["label"]][: self.shown]
        hard = [data[i] for i in order[: self.shown]]
        seen = {row["text"] for row in (*data, *validation)}
        if self.writes == "program":
            need = {label: gaps[label] + sum(row["label"] == label for row in hard) for label in labels}
            fresh = written(apportion(need if self.targeted else dict.fromkeys(labels, 1), self.samples), course.seed + 1000003 * at)
            return [row for row in fresh if row["text"] not in seen], 0
        lines = [
            "Write new examples for a text classifier.", "Labels: " + json.dumps(labels, ensure_ascii=False),
            "Its report on validation texts:", about, *_listed("It answers these right:", right),
            *_listed("It answers these wrong:", wrong),
            *_listed("Of its wrong answers it is surest of these:", hard),
            f"Write {self.samples} new examples that help it most where it fails. One JSON object per line, nothing else:",
            '{"text": "...", "label": "one of the labels"}',
        ]  # fmt: skip
        prompt = "\n".join(lines) + "\n"
        if course.speaker is None and course.teacher is not None:
            length, room = len(encode(course.teacher.tokenizer, prompt)) + self.new, parts(course.teacher.model.config).context
            if length > room:
                raise SmeltError(
                    f"pgkd: prompt and answer take {length} tokens, and the teacher has {room} positions; lower 'shown' or 'new'"
                )
        (answer,) = course.ask([prompt], self.new, self.temperature)
        return parsed(answer, labels, seen, self.samples)


def _answers(loaded: Any, rows: Sequence[Row], labels: Sequence[str]) -> tuple[list[str], Tensor]:
    """(the student's label of each row, how sure it is): one likelihood per row and label."""
    room = parts(loaded.model.config).context
    pairs = [paired(loaded.tokenizer, _prompt(row["text"]), label, room) for row in rows for label in labels]
    if any(pair is None for pair in pairs):
        raise SmeltError(f"pgkd: a label is longer than the model's {room} positions")
    sure, best = likelihood(loaded, [pair for pair in pairs if pair]).view(len(rows), len(labels)).softmax(-1).max(-1)
    return [labels[i] for i in best.tolist()], sure


def _prompt(text: str) -> str:
    return f"Text: {text}\nLabel: "


def _listed(head: str, rows: Sequence[Row]) -> list[str]:
    return [head, *(json.dumps({"text": row["text"], "label": row["label"]}, ensure_ascii=False) for row in rows)] if rows else []
