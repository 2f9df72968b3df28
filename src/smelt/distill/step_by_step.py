"""Learn to say why, beside learning to say what: rationales as a second task, gone when the student is used."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Lt

from smelt.distill import Procedure
from smelt.distill._examples import Batches, Epochs, Pair, Weighed, judged, paired, read_examples, share
from smelt.distill._tasks import arithmetic
from smelt.distill.cross_entropy import CrossEntropy
from smelt.spec import Paper, SmeltError

__all__ = ["StepByStep"]


@dataclass(frozen=True)
class StepByStep(Procedure):
    """L = mean over label tokens of -log q("[label] x" -> y) + weight * mean over rationale tokens of -log q("[rationale] x" -> c).

    Nats per token, each task divided by its own tokens of the step: rationales are about ten times longer and would drown
    the labels. x, y, c are the fields `input`, `label`, `rationale` of the .jsonl file `examples`; rows alternate between the
    tasks and end with the end of text, which is learned too. Ask the student with "[label] x\\n": the rationale costs
    nothing then. With weight = 0 there are rows of labels only, and this is cross_entropy() on them bit for bit.

    examples = "": `count` sums of three digits with their partial sums as rationales, made by a program.
    rationales = "teacher": the rows without one ask the teacher for it after `shots` rows that have one, greedily,
    with `new` tokens. A rationale in which the label is not said as a word of its own is left out, whoever wrote it.

    A `held` share of the rows (by a hash of the input) is not learned: `accuracy` in the report is how many of them the
    student answers greedily, to the end, with the label.

    Cost: that of cross_entropy on the same positions; one answer of the teacher per row without a rationale. Raises
    SmeltError for rows it cannot read (file:line), a batch of one row, and when no rationale is left.

    Differs from the paper: a decoder that reads the prompt, not T5; the sum L_label + weight L_rationale with the two
    means exact over the step (the authors' code mixes the two losses with a factor of one half; reconstruction).
    """

    paper: ClassVar = Paper("Distilling Step-by-Step!", "arXiv:2305.02301", "section 3.2, eq. 3 and 4")
    examples: str = ""
    weight: Annotated[float, Ge(0)] = 1.0
    rationales: Literal["given", "teacher"] = "given"
    shots: Annotated[int, Ge(1)] = 4
    new: Annotated[int, Ge(1)] = 128
    count: Annotated[int, Ge(2)] = 1000
    held: Annotated[float, Ge(0), Lt(1)] = 0.2

    @property
    def taught(self) -> str:  # type: ignore[override]
        return "text" if self.rationales == "teacher" else "no"

    @classmethod
    def example(cls) -> Self:
        return cls(count=20)

    def teach(self, course: Any) -> dict[str, Any]:
        given = read_examples(self.examples, ("input", "label"), ("rationale",)) if self.examples else None
        every = given or arithmetic(self.count, course.seed)
        rows = [row for row in every if share(row["input"]) >= self.held]
        tests = [row for row in every if share(row["input"]) < self.held]
        warnings: list[str] = []
        if self.weight and self.rationales == "teacher":
            rows = self._asked(course, rows)
        good = [row for row in rows if "rationale" in row and _says(row["rationale"], row["label"])]
        if not rows:
            raise SmeltError(f"step_by_step: all {len(every)} rows are held out; lower 'held'")
        if self.weight and not good:
            raise SmeltError("step_by_step: no row has a rationale that says its label; give some, or rationales='teacher'")
        if self.weight and len(good) < len(rows):
            warnings.append(f"step_by_step: {len(rows) - len(good)} of {len(rows)} rows have no rationale that says their label")
        texts = [[(f"[label] {row['input']}\n", row["label"]) for row in rows]]
        if self.weight:
            texts.append([(f"[rationale] {row['input']}\n", row["rationale"]) for row in good])
        room = course.settings.context + 1
        made = [[paired(course.student.tokenizer, *pair, room) for pair in task] for task in texts]
        tasks = [[pair for pair in task if pair is not None] for task in made]
        if lost := sum(map(len, made)) - sum(map(len, tasks)):
            warnings.append(f"step_by_step: {lost} answers are longer than the context of {room - 1} tokens and are left out")
        if not all(tasks):
            raise SmeltError(f"step_by_step: no answer fits into a context of {room - 1} tokens")
        log = course.fit(Weighed(CrossEntropy()) if self.weight else CrossEntropy(), rows=self._rows(course, tasks))
        figures: dict[str, Any] = {"labels": len(rows), "rationales": len(good)}
        asked = [paired(course.student.tokenizer, f"[label] {row['input']}\n", row["label"], room) for row in tests]
        if asked:  # an answer without room is a wrong one
            figures["accuracy"] = int(judged(course.student, [pair for pair in asked if pair])[1].sum()) / len(asked)
        return log | {"warnings": log["warnings"] + warnings, "report": figures}

    def _rows(self, course: Any, tasks: list[list[Pair]]) -> Batches:
        """Rows of the tasks in turn; the weights make each task's loss a mean over its own tokens of the step."""
        settings, n = course.settings, len(tasks)
        if settings.batch < n:
            raise SmeltError(f"step_by_step: a step needs a row of each of its {n} tasks; train: batch={settings.batch}")
        orders = [Epochs(len(task), course.seed) for task in tasks]
        each = [len(range(task, settings.batch, n)) for task in range(n)]  # rows of a task in a step

        def make(step: int) -> list[tuple[list[int], int]]:
            chosen = [tasks[at % n][orders[at % n].at(step * each[at % n] + at // n)] for at in range(settings.batch)]
            return [(pair.prompt + pair.answer, len(pair.prompt)) for pair in chosen]

        def weigh(lengths: list[int]) -> list[float]:
            shares = [share * sum(lengths) / sum(lengths[task::n]) for task, share in zip(range(n), (1.0, self.weight), strict=False)]
            return [shares[at % n] for at in range(len(lengths))]

        return Batches(make, weigh, settings, course.student.tokenizer.eos_token_id)

    def _asked(self, course: Any, rows: list[dict[str, str]]) -> list[dict[str, str]]:
        """The rows, with the teacher's rationale where there was none."""
        shown = [row for row in rows if "rationale" in row][: self.shots]
        lacking = [row for row in rows if "rationale" not in row]
        if not shown:
            what = "step_by_step: the teacher is shown how a rationale looks; give at least one row a 'rationale'"
            raise SmeltError(what, file=self.examples)
        head = "".join(f"Question: {row['input']}\nReason: {row['rationale']}\nAnswer: {row['label']}\n\n" for row in shown)
        answers = course.ask([f"{head}Question: {row['input']}\nReason:" for row in lacking], self.new)
        texts = [re.split(r"\n\s*(?:Question|Answer)\s*:", answer)[0].strip() for answer in answers]
        # where the teacher came to another answer, its reasons lead there
        ends = [re.search(r"\n\s*Answer\s*:[ \t]*(.*)", answer) for answer in answers]
        right = [end is None or end[1].strip() == row["label"].strip() for end, row in zip(ends, lacking, strict=True)]
        found = iter([text if text and good else "" for text, good in zip(texts, right, strict=True)])
        made = [row if "rationale" in row else row | {"rationale": next(found)} for row in rows]
        return [row if row["rationale"] else {key: text for key, text in row.items() if key != "rationale"} for row in made]


def _says(rationale: str, label: str) -> bool:
    return re.search(rf"(?<![\w-]){re.escape(label.strip())}(?!\w)", rationale) is not None
