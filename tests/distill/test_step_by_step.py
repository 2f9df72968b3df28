from __future__ import annotations

import json

import pytest
import torch

from smelt.distill._examples import judged, paired, share, shuffled
from smelt.distill._tasks import arithmetic
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.step_by_step import StepByStep, _says
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Course, Training, teach

SETTINGS = Training(tokens=3 * 4 * 48, context=48, batch=4, lr=1e-2)


def course(folder, settings=SETTINGS, speaker=None):
    student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), folder)
    return Course(student, (), None, settings, folder, seed=3, speaker=speaker)


class Spy(Course):
    """Keeps the rows and the objective of its training instead of training."""

    def fit(self, objective, *, rows=None, **more):
        self.kept = objective, rows
        return {"warnings": []}


class Speaker:
    def __init__(self, answers):
        self.said, self.prompts = answers, []

    def identity(self):
        return "speaker"

    def answers(self, prompts, new, temperature, seed):
        self.prompts += prompts
        yield from (
            (at, next(text for name, text in self.said.items() if f"Question: {name}\nReason:" in p[-40:])) for at, p in enumerate(prompts)
        )


def spied(method, folder, **more):
    made = course(folder, **more)
    spy = Spy(made.student, (), None, made.settings, folder, seed=3, speaker=made.speaker)
    return spy, method.teach(spy)


def test_without_rationales_it_is_training_on_labels_bit_for_bit(tmp_path):
    one, two = course(tmp_path / "one"), course(tmp_path / "two")
    about = StepByStep(weight=0, count=20).teach(one)
    tokenizer = tiny_tokenizer()
    pairs = [paired(tokenizer, f"[label] {row['input']}\n", row["label"], 49) for row in arithmetic(20, 3) if share(row["input"]) >= 0.2]
    two.fit(CrossEntropy(), rows=shuffled(pairs, SETTINGS, 3, tokenizer.eos_token_id))
    held = [row for row in arithmetic(20, 3) if share(row["input"]) < 0.2]
    right = judged(one.student, [paired(tokenizer, f"[label] {row['input']}\n", row["label"], 49) for row in held])[1]
    assert held and about["report"]["accuracy"] == right.float().mean()
    for name, value in one.student.model.state_dict().items():
        assert torch.equal(value, two.student.model.state_dict()[name]), name


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_each_task_is_a_mean_over_its_own_tokens(tmp_path, weight):
    spy, _ = spied(StepByStep(weight=weight, count=20), tmp_path)
    objective, rows = spy.kept
    batch = [rows[i] for i in range(4, 8)]
    inputs = {name: torch.stack([row[name] for row in batch]) for name in batch[0]}
    logits = spy.student.model(input_ids=inputs["input_ids"]).logits
    keep = inputs["labels"] != -100
    loss = objective(student=logits, labels=inputs["labels"].clamp(min=0), keep=keep, weights=inputs["weights"])
    got = torch.where(keep, loss, 0.0).sum() / keep.sum()
    means, texts = [], [tiny_tokenizer().decode(row) for row in inputs["input_ids"]]
    for task in ("[label]", "[rationale]"):
        found = []
        for row in range(4):
            if texts[row].startswith(task):
                found += [-logits[row, t].log_softmax(-1)[inputs["labels"][row, t]] for t in range(48) if keep[row, t]]
        means.append(sum(found) / len(found))
    torch.testing.assert_close(got, means[0] + weight * means[1])


def test_a_batch_in_parts_teaches_the_same(tmp_path):
    """Each task's mean is that of the whole step, however many micro-batches it is cut into."""
    models = []
    for micro in (0, 2, 1):
        student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), tmp_path)
        settings = Training(tokens=3 * 4 * 48, context=48, batch=4, micro=micro, lr=1e-2)
        teach(student, None, None, StepByStep(count=20), settings, tmp_path / str(micro))
        models.append(student.model)
    for other in models[1:]:
        for a, b in zip(models[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_rows_alternate_and_an_epoch_shows_every_label_once(tmp_path):
    spy, about = spied(StepByStep(count=10, held=0), tmp_path, settings=Training(tokens=10 * 2 * 48, context=48, batch=2))
    _, rows = spy.kept
    texts = [tiny_tokenizer().decode(rows[i]["input_ids"]) for i in range(20)]
    assert [text.startswith("[label]") for text in texts] == [True, False] * 10
    assert len(set(texts[::2])) == len(set(texts[1::2])) == 10
    assert about["report"] == {"labels": 10, "rationales": 10}


def test_a_rationale_says_its_label_as_a_word():
    assert _says("3 + 5 = 8. 8 - 2 = 6.", "6") and _says("it is -5.", "-5") and _says("so (yes)", "yes")
    assert not _says("16", "6") and not _says("-5", "5") and not _says("yesterday", "yes") and not _says("", "6")


def test_the_teacher_is_asked_for_what_is_missing_and_wrong_answers_are_left_out(tmp_path):
    rows = [{"input": "1 + 1", "label": "2", "rationale": "1 + 1 = 2."}, *({"input": f"{i} + 2", "label": str(i + 2)} for i in range(3, 7))]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    speaker = Speaker(
        {
            "3 + 2": " 3 + 2 = 5.\nAnswer: 5\n\nQuestion: 9 + 9\nReason: 18",
            "4 + 2": " 4 + 2 = 7.\nAnswer: 7",  # wrong
            "5 + 2": " I know it.",  # says no label
            "6 + 2": " 6 + 2 = 8, not 9.\nAnswer: 9",  # right in passing, wrong in the end
        }
    )
    method = StepByStep(examples=str(file), rationales="teacher", shots=2, held=0)
    assert method.taught == "text" and StepByStep().taught == "no"
    spy, about = spied(method, tmp_path / "course", speaker=speaker)
    assert about["report"] == {"labels": 5, "rationales": 2}
    assert any("3 of 5 rows have no rationale" in text for text in about["warnings"])
    assert len(speaker.prompts) == 4 and speaker.prompts[0].startswith("Question: 1 + 1\nReason: 1 + 1 = 2.\nAnswer: 2\n\n")
    texts = {tiny_tokenizer().decode(spy.kept[1][i]["input_ids"]) for i in range(1, 12, 2)}
    assert {text[: text.index("<")].split("\n")[1] for text in texts} == {"1 + 1 = 2.", "3 + 2 = 5."}
    method.teach(spy)
    assert len(speaker.prompts) == 4  # nothing is asked for twice


def test_what_cannot_be_learned_from_is_refused(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"input": "a", "label": "b"}\n')
    for method, settings, said in (
        (StepByStep(examples=str(file), held=0), SETTINGS, "no row has a rationale"),
        (StepByStep(examples=str(file), rationales="teacher", held=0), SETTINGS, "at least one row"),
        (StepByStep(count=10), Training(tokens=48, context=48, batch=1), "batch=1"),
        (StepByStep(count=10), Training(tokens=8, context=2, batch=2), "no answer fits"),
    ):
        with pytest.raises(SmeltError, match=said):
            spied(method, tmp_path / "course", settings=settings)
