from __future__ import annotations

import json
import math

import pytest
import torch

from smelt.distill import pgkd
from smelt.distill._examples import share
from smelt.distill._tasks import LABELS, keywords
from smelt.distill.pgkd import PGKD, _answers, _prompt
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Course, Training

SETTINGS = Training(tokens=12 * 4 * 32, context=32, batch=4, lr=1e-2)


class Spy(Course):
    """Notes what is trained on, and instead of training sets the student's final norm to the number of the training."""

    def fit(self, objective, *, rows=None, settings=None, name="fit", **more):
        self.__dict__.setdefault("fits", []).append((name, settings.steps, rows))
        with torch.no_grad():
            self.student.model.model.norm.weight.fill_(len(self.fits))
        log = [{"step": settings.steps, "tokens": settings.tokens, "loss": 1.0}]
        return {"log": log, "steps": settings.steps, "tokens": settings.tokens, "seconds": 1.0, "flops": 1, "warnings": []}

    def read(self, *args, **more):
        raise AssertionError("there is no corpus to read")


class Speaker:
    def __init__(self, answer):
        self.answer, self.prompts = answer, []

    def identity(self):
        return "speaker"

    def answers(self, prompts, new, temperature, seed):
        for at, prompt in enumerate(prompts):
            self.prompts.append(prompt)
            yield at, self.answer(len(self.prompts))


def spied(method, folder, speaker=None, settings=SETTINGS):
    student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), folder)
    spy = Spy(student, (), None, settings, folder, seed=3, speaker=speaker)
    return spy, method.teach(spy)


def scripted(monkeypatch, rights):
    """The student's answers to validation texts are right as often as the script says, every third one to training texts wrong."""
    left = iter(rights)

    def answers(loaded, rows, labels):
        held = share(rows[0]["text"]) < 0.2
        good = next(left) if held else len(rows)
        wrong = [i >= good if held else i % 3 == 0 for i in range(len(rows))]
        said = [labels[(labels.index(row["label"]) + bad) % len(labels)] for row, bad in zip(rows, wrong, strict=True)]
        return said, torch.linspace(0.2, 0.9, len(rows))

    monkeypatch.setattr(pgkd, "_answers", answers)


def test_the_answer_is_the_likeliest_label_and_its_share_the_confidence():
    loaded = Loaded(tiny(layers=1, hidden=16, heads=2, kv_heads=1), tiny_tokenizer(), None)
    rows, labels = keywords(6, 0), ["animal", "drink", "tool"]
    says, sure = _answers(loaded, rows, labels)
    for row, said, confidence in zip(rows, says, sure.tolist(), strict=True):
        found = []
        for label in labels:
            prompt = tiny_tokenizer()(_prompt(row["text"]))["input_ids"]
            answer = [*tiny_tokenizer()(label)["input_ids"], 0]
            logs = loaded.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            found.append(sum(logs[len(prompt) - 1 + t, token].item() for t, token in enumerate(answer)))
        best = max(range(3), key=found.__getitem__)
        assert said == labels[best]
        assert confidence == pytest.approx(1 / sum(math.exp(x - found[best]) for x in found), rel=1e-4)


def test_it_ends_without_gain_and_leaves_the_best_student(tmp_path, monkeypatch):
    scripted(monkeypatch, [1, 3, 2, 3, 9, 9])
    spy, about = spied(PGKD(writes="program", count=80, rounds=5, patience=2, samples=8), tmp_path)
    held = sum(share(row["text"]) < 0.2 for row in keywords(80, 3))
    assert about["report"]["accuracy_by_round"] == [n / held for n in (1, 3, 2, 3)]  # the last two without gain
    assert about["report"]["accuracy"] == 3 / held and about["report"]["rounds"] == 3
    assert [(name, steps) for name, steps, _ in spy.fits] == [("round-0", 6), ("round-1", 1), ("round-2", 1), ("round-3", 1)]
    assert (spy.student.model.model.norm.weight == 2).all()  # as it was after round 1
    assert about["steps"] == 9 and [entry["step"] for entry in about["log"]] == [6, 7, 8, 9]


def test_the_teacher_sees_report_and_failures_but_no_validation_text(tmp_path, monkeypatch):
    scripted(monkeypatch, [3, 5, 6])
    rows = keywords(80, 3)
    held = [row["text"] for row in rows if share(row["text"]) < 0.2]

    def answer(time):
        fresh = {"text": f"a new gnu {time}", "label": "animal"}
        return "\n".join(map(json.dumps, [fresh, {"text": held[0], "label": "animal"}, fresh | {"label": "beast"}]))

    speaker = Speaker(answer)
    spy, about = spied(PGKD(count=80, rounds=2, shown=4, samples=5), tmp_path, speaker)
    assert about["report"]["written"] == 2
    assert [text.split(": ", 1)[1] for text in about["warnings"]] == [
        f"round {at}: 2 of the teacher's lines are no new rows" for at in (1, 2)
    ]
    texts = {tiny_tokenizer().decode(spy.fits[-1][2][i]["input_ids"]) for i in range(400)}
    for text in ("a new gnu 1", "a new gnu 2"):
        assert any(text in row for row in texts)
    for prompt in speaker.prompts:
        assert not any(text in prompt for text in held)
        assert "label\trows\tprecision\trecall\tf1" in prompt and "Write 5 new examples" in prompt
    hard = speaker.prompts[0].split("surest of these:\n")[1].split("Write")[0].strip().splitlines()
    data = [row for row in rows if share(row["text"]) >= 0.2]
    assert [json.loads(line) for line in hard] == [data[i] for i in range(len(data) - 1, -1, -1) if i % 3 == 0][:4]


def test_the_program_writes_for_labels_that_fail(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(pgkd, "written", lambda wanted, seed: asked.append(wanted) or [])

    def answers(loaded, rows, labels):
        return ["tool" if row["label"] == "metal" else row["label"] for row in rows], torch.ones(len(rows))

    monkeypatch.setattr(pgkd, "_answers", answers)
    for targeted in (True, False):
        spied(PGKD(writes="program", targeted=targeted, count=80, rounds=1, samples=16), tmp_path / str(targeted))
    assert asked == [{label: 16 * (label == "metal") for label in LABELS}, dict.fromkeys(LABELS, 2)]


def test_settings_that_will_not_do(tmp_path):
    for change, said in (
        ({"writes": "program", "examples": "x"}, "leave 'examples' out"),
        ({"targeted": False}, "always shown the report"),
    ):
        with pytest.raises(SmeltError, match=said):
            PGKD(**change)
    with pytest.raises(SmeltError, match="3 steps are too few"):
        spied(PGKD(writes="program", rounds=3), tmp_path, settings=Training(tokens=3 * 4 * 32, context=32, batch=4))
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": "b"}\n')
    with pytest.raises(SmeltError, match="1 labels"):
        spied(PGKD(examples=str(file)), tmp_path)


def test_a_prompt_that_a_local_teacher_cannot_hold_is_refused(tmp_path, monkeypatch):
    scripted(monkeypatch, [1, 1])
    student = Loaded(tiny(layers=1, hidden=16, heads=2, kv_heads=1), tiny_tokenizer(), tmp_path)
    course = Spy(student, (student,), None, SETTINGS, tmp_path, seed=3)
    with pytest.raises(SmeltError, match="the teacher has 256 positions"):
        PGKD(count=80, rounds=1).teach(course)
