"""The helper smelt/_train_judge.py: lists in their order, grades of a teacher asked for once, heads beside the model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn

import smelt._train_loop
from smelt import _train_judge, registry
from smelt._train_judge import learner, ranked
from smelt.model._load import Loaded, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Answer, Scoring
from smelt.rank._training import Learns, read
from smelt.recipe import Training
from smelt.spec import SmeltError

SETTINGS = Training(data=None, tokens=32 * 4 * 25, context=32, batch=4, lr=3e-3, warmup=0.0)


@dataclass(frozen=True)
class Toy(Scoring, Learns):
    """score = head(mean state of the passage); learns the softmax of the grades."""

    labels: Any = None
    weights: Any = None
    seen: list = field(default_factory=list, compare=False)

    def heads(self, config):
        return nn.Linear(config.hidden_size, 1)

    def answers(self, asked, model):
        raise AssertionError

    def scores(self, asked, model):
        raise AssertionError

    def collate(self, lists, model, context):
        self.seen.append([one.query for one in lists])
        ids = [model.tokenizer(p)["input_ids"][: context // 2] for one in lists for p in one.passages]
        width = max(map(len, ids))
        rows = torch.tensor([row + [0] * (width - len(row)) for row in ids])
        return {"ids": rows, "grades": torch.tensor([one.grades for one in lists])}

    def loss(self, model, heads, batch):
        state = model.base_model(batch["ids"], use_cache=False).last_hidden_state.mean(1)
        score = heads(state).view_as(batch["grades"])
        return -(batch["grades"].softmax(-1) * score.log_softmax(-1)).sum(-1)


@dataclass(frozen=True)
class Teacher(Scoring):
    """The passage's number, negative: the opposite of what the data says."""

    comparable = True
    asked: list = field(default_factory=list, compare=False)

    def answers(self, asked, model):
        self.asked.extend(a.query for a in asked)
        return [Answer(list(range(len(a.passages))), s) for a, s in zip(asked, self.scores(asked, model))]

    def scores(self, asked, model):
        return [torch.tensor([-float(p.split()[1]) for p in a.passages]) for a in asked]


class Data:
    def __init__(self, count=10):
        self.count = count

    def lists(self, split):
        for i in range(self.count):
            yield f"q{i}", [f"good {5 + i}", f"bad {i}"], [1.0, 0.0]


@pytest.fixture(autouse=True)
def _named(monkeypatch):
    unregistered(monkeypatch)


def unregistered(monkeypatch):
    """Judges of a test are in no registry."""
    monkeypatch.setattr(registry, "name_of", lambda method: ("rank", "toy"))
    monkeypatch.setattr(registry, "text", lambda method: "toy()")
    monkeypatch.setattr(registry, "source_digest", lambda method: "")


def loaded():
    return Loaded(tiny("llama", context=64), tiny_tokenizer(), None)


def test_every_list_comes_before_any_comes_again_and_the_loss_falls(tmp_path):
    judge, model = Toy(), loaded()
    log = ranked(model, None, judge, replace(SETTINGS, data=Data()), tmp_path / "run", tmp_path / "result")
    flat = [q for batch in judge.seen for q in batch]
    assert len(flat) == 100 and all(len(set(flat[i : i + 10])) == 10 for i in range(0, 100, 10))
    assert log["log"][-1]["loss"] < log["log"][0]["loss"] and log["lists"] == 10 and not model.model.training
    assert read(Toy(), model._replace(folder=tmp_path / "result")).weight.shape == (1, 64)


def test_a_teacher_grades_each_list_once_even_after_a_kill(tmp_path, monkeypatch):
    labels = Teacher()
    judge, settings = Toy(labels=labels), replace(SETTINGS, data=Data())
    monkeypatch.setattr(_train_judge, "GRADED", 4)
    monkeypatch.setattr(smelt._train_loop, "train", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ranked(loaded(), loaded(), judge, settings, tmp_path / "run", tmp_path / "result")
    monkeypatch.undo()
    unregistered(monkeypatch)
    model = loaded()
    ranked(model, loaded(), judge, settings, tmp_path / "run", tmp_path / "result")
    assert sorted(labels.asked) == sorted(f"q{i}" for i in range(10))
    head = read(Toy(), model._replace(folder=tmp_path / "result"))
    with torch.no_grad():
        ids = [tiny_tokenizer()(p)["input_ids"] for p in ("good 7", "bad 2")]
        good, bad = (head(model.model.base_model(torch.tensor([row])).last_hidden_state.mean(1)) for row in ids)
    assert bad > good  # the teacher's opinion, not the data's


def test_seeds_and_arms_share_the_teachers_grades_and_another_teacher_has_its_own(tmp_path, monkeypatch):
    labels, settings, shared = Teacher(), replace(SETTINGS, data=Data()), tmp_path / "teacher"
    save(tiny("llama", context=64), tiny_tokenizer(), tmp_path / "one")
    save(tiny("llama", context=64, layers=1), tiny_tokenizer(), tmp_path / "two")
    for run, (who, seed) in enumerate([("one", 0), ("one", 1), ("two", 0)]):
        teacher = loaded()._replace(folder=tmp_path / who)
        places = tmp_path / f"run{run}", tmp_path / f"result{run}"
        ranked(loaded(), teacher, Toy(labels=labels), settings, *places, seed=seed, cache_folder=shared)
    assert len(labels.asked) == 20 and len(list(shared.glob("grades-*.jsonl"))) == 2


def test_refusals(tmp_path):
    settings = replace(SETTINGS, data=Data())
    for judge, teacher, more, what in [
        (Toy(labels=Teacher()), None, {}, "labels and no teacher"),
        (Toy(), loaded(), {}, "a teacher and no labels"),
        (Toy(), None, {"context": 65}, "longer than the positions"),
        (Toy(), None, {"shard": "fsdp2"}, "one process"),
        (Toy(), None, {"adapter": "x"}, "leave out 'adapter'"),
        (Toy(), None, {"data": Data(0)}, "no list to learn from"),
    ]:
        with pytest.raises(SmeltError, match=what):
            ranked(loaded(), teacher, judge, replace(settings, **more), tmp_path / "run", tmp_path / "result")
    assert learner(Teacher()) is None


def test_a_judge_that_reads_text_by_text_may_have_lists_longer_than_the_model(tmp_path):
    class Apart(Toy):
        together = False

    settings = replace(SETTINGS, data=Data(), context=128, tokens=128 * 4 * 2)
    with pytest.raises(SmeltError, match="longer than the positions"):
        ranked(loaded(), None, Toy(), settings, tmp_path / "a", tmp_path / "b")
    assert ranked(loaded(), None, Apart(), settings, tmp_path / "run", tmp_path / "result")["steps"] == 2
