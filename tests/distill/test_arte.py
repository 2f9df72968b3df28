from __future__ import annotations

import json

import pytest
import torch

from smelt.distill._examples import Pair, likelihood
from smelt.distill.arte import ARTE, _learned
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Course, Training

SETTINGS = Training(tokens=4 * 4 * 32, context=32, batch=4, lr=1e-2)


class Spy(Course):
    """Keeps the rows of the student's training instead of training; aligns the teacher in earnest."""

    def fit(self, objective, *, rows=None, name="fit", **more):
        if name == "align":
            self.pupil, self.pairs = more["pupil"], rows
            return super().fit(objective, rows=rows, name=name, **more)
        self.kept = rows
        return {"flops": 0, "warnings": []}


def course(folder, settings=SETTINGS, seed=0):
    sizes = {"layers": 1, "hidden": 16, "ffn": 24, "heads": 2, "kv_heads": 1}
    student = Loaded(tiny(**sizes, seed=seed), tiny_tokenizer(), folder / "student")
    teacher = Loaded(tiny(**sizes, seed=7), tiny_tokenizer(), folder / "teacher")
    made = Spy(student, (teacher,), None, settings, folder, seed=3)
    ids = torch.randint(4, 300, (200, 32), generator=torch.Generator().manual_seed(5))
    made.rows = lambda: [{"input_ids": row, "labels": row} for row in ids]
    return made


def test_drafts_are_scored_by_what_the_student_makes_of_them(tmp_path):
    spy, decode = course(tmp_path), tiny_tokenizer().decode
    tests = [Pair([5, 6, 7], [8, 9]), Pair([10, 11], [12])]
    drafts = [[20, 21, 22], [30]]
    got = ARTE()._scores(spy, ["def f", "import os"], drafts, tests)
    for prompt, draft, score in zip(("def f", "import os"), drafts, got, strict=True):
        shown = tiny_tokenizer()(prompt + decode(draft) + "\n\n")["input_ids"]
        total = 0.0
        for x, y in tests:
            logs = spy.student.model(input_ids=torch.tensor([shown + x + y])).logits[0].log_softmax(-1)
            total += sum(logs[len(shown + x) - 1 + t, token].item() for t, token in enumerate(y)) / len(y)
        assert score == pytest.approx(total / 2, rel=1e-4)
    other = ARTE()._scores(course(tmp_path / "other", seed=1), ["def f", "import os"], drafts, tests)
    assert got != other  # another student, other preferences


def test_the_pairs_are_best_and_worst_and_the_aligned_teacher_prefers_the_best(tmp_path):
    spy = course(tmp_path)
    method = ARTE(prompts=6, drafts=4, tests=3, samples=8, new=5, passes=8, teacher_lr=1e-2)
    about = method.teach(spy)
    assert about["report"] == {"pairs": 6, "samples": 8} and about["flops"] > 0
    drafts = [answer for line in (tmp_path / "drafts.jsonl").read_text().splitlines() for answer in json.loads(line)["value"]]
    scores = [json.loads(line)["value"] for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert len(drafts) == len(scores) == 24
    tests, prompts = method._from_text(spy)
    lengths = [len(tiny_tokenizer()(text)["input_ids"]) for text in prompts[:6] for _ in range(4)]
    order = sorted(range(24), key=lengths.__getitem__)  # answers stand by the length of their prompt
    by_prompt = [[] for _ in range(6)]
    for place, answer in zip(order, drafts, strict=True):
        by_prompt[place // 4].append((scores[place], answer))
    rows = spy.pairs
    assert len(tests) == 3
    for side, kind in enumerate((max, min)):
        seen = {tuple(rows[i]["labels"][rows[i]["labels"] != -100].tolist()) for i in range(side, 12, 2)}
        assert seen == {tuple(kind(found)[1]) for found in by_prompt}
    chosen, rejected = ([Pair(*_split(rows[i])) for i in range(start, 12, 2)] for start in (0, 1))
    gaps = [likelihood(one, chosen) - likelihood(one, rejected) for one in (spy.teacher, spy.pupil)]
    assert (gaps[1] > gaps[0]).all()


def _split(row):
    keep = row["labels"] != -100
    first = int(keep.nonzero()[0, 0])
    return row["input_ids"][: first + 1].tolist(), row["labels"][keep].tolist()


def test_a_killed_run_draws_and_scores_nothing_again_and_one_draft_aligns_nothing(tmp_path, monkeypatch):
    spy = course(tmp_path)
    method = ARTE(drafts=1, samples=8, new=5)
    about = method.teach(spy)
    assert about["report"] == {"pairs": 0, "samples": 8} and not hasattr(spy, "pairs")
    text = (tmp_path / "samples.jsonl").read_text()
    again = course(tmp_path)
    monkeypatch.setattr(again.teacher.model, "generate", None)
    method.teach(again)
    assert (tmp_path / "samples.jsonl").read_text() == text
    assert all(torch.equal(spy.kept[i]["input_ids"], again.kept[i]["input_ids"]) for i in range(8))


def test_the_student_learns_the_end_only_where_the_teacher_came_to_it(tmp_path):
    spy, end = course(tmp_path), tiny_tokenizer().eos_token_id
    ids = tiny_tokenizer()("return x")["input_ids"]
    prompt = tiny_tokenizer()("def f")["input_ids"]
    assert _learned(spy.student, spy.teacher, "def f", ids, 40) == Pair(prompt, ids)
    assert _learned(spy.student, spy.teacher, "def f", [*ids, end], 40) == Pair(prompt, [*ids, end])
    assert _learned(spy.student, spy.teacher, "def f", [end], 40) is None
    short = _learned(spy.student, spy.teacher, "def f", ids, 4)
    assert short == Pair(prompt[-2:], ids[:2])


def test_files_give_preference_examples_and_prompts_apart(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"input": f"x{i}", "output": f"y{i}"}) for i in range(7)))
    tests, prompts = ARTE(examples=str(file), tests=3)._from_file(course(tmp_path))
    shown = {tiny_tokenizer().decode(pair.prompt) for pair in tests}
    assert len(shown) == 3 and len(prompts) == 4 and shown | set(prompts) == {f"x{i}\n" for i in range(7)}
    with pytest.raises(SmeltError, match="no prompt is left"):
        ARTE(examples=str(file), tests=7)._from_file(course(tmp_path))


def test_what_will_not_do_is_refused(tmp_path):
    with pytest.raises(SmeltError, match=r"arte: preference: .* such as dpo"):
        ARTE(preference=CrossEntropy())
    with pytest.raises(SmeltError, match="batch=3 must be even"):
        ARTE(prompts=2, drafts=2, tests=2, samples=4, new=4).teach(course(tmp_path, Training(tokens=96, context=32, batch=3)))
    with pytest.raises(SmeltError, match="the teacher has 256 positions"):
        ARTE()._said(course(tmp_path / "b"), course(tmp_path / "b").teacher, "x", ["def"], 400)
    none = course(tmp_path / "c")
    none.teachers = ()
    with pytest.raises(SmeltError, match="teacher: NAME"):
        ARTE().teach(none)
