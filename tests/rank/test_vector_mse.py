from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from helpers.rank import LISTS, loaded, taught
from smelt import _train_judge
from smelt.journal import Journal
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._training import Labelled
from smelt.rank.embedding import Embedding
from smelt.rank.margin_mse import MarginMSE
from smelt.rank.multi_exit_embedding import MultiExitEmbedding
from smelt.rank.vector_mse import VectorMSE
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

TEACHER = loaded(seed=5)


def with_vectors(lists=LISTS, width=None):
    def vectors(one):
        each = [Embedding().embed([one.query], TEACHER, True), Embedding().embed(one.passages, TEACHER)]
        return torch.cat(each)[:, :width]

    return [one._replace(vectors=vectors(one)) for one in lists]


def test_the_loss_is_a_loop_over_texts():
    judge, model, lists = VectorMSE(), loaded(), with_vectors()
    with torch.no_grad():
        found = judge.loss(model.model, None, judge.collate(lists, model, 200))
    for one, value in zip(lists, found, strict=True):
        mine = [judge.embed([one.query], model, True)[0], *judge.embed(one.passages, model)]
        each = [float(((a - b) ** 2).sum()) for a, b in zip(mine, one.vectors, strict=True)]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-4)
        assert value.item() == pytest.approx(sum(2 - 2 * float(a @ b) for a, b in zip(mine, one.vectors)) / len(each), rel=1e-4)


def test_the_teacher_itself_loses_nothing():
    judge = VectorMSE()
    with torch.no_grad():
        assert judge.loss(TEACHER.model, None, judge.collate(with_vectors(), TEACHER, 400)).abs().max() < 1e-9


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_training_brings_the_vectors_to_the_teachers(architecture):
    judge, model, lists = VectorMSE(), loaded(architecture), with_vectors()
    _, losses = taught(judge, model, steps=60, lists=lists)
    assert losses[-1] < 0.1 * losses[0]
    asked = [Asked(one.query, one.passages) for one in lists]
    for mine, wanted in zip(judge.scores(asked, model), Embedding().scores(asked, TEACHER), strict=True):
        torch.testing.assert_close(mine, wanted, atol=0.15, rtol=0)


def test_every_exit_learns_them():
    judge = MultiExitEmbedding(judge=VectorMSE(), exits=(1, 2))
    assert judge.copies and not MultiExitEmbedding(judge=MarginMSE()).copies
    model, lists = loaded(layers=2), with_vectors()
    batch = judge.collate(lists, model, 200)
    with torch.no_grad():
        found = judge.loss(model.model, None, batch)
        each = [VectorMSE(judge=Embedding(layer=at)).loss(model.model, None, batch) for at in (1, 2)]
    torch.testing.assert_close(found, 0.5 * each[0] + each[1])


def test_vectors_are_asked_for_once_and_outlive_a_kill(tmp_path, monkeypatch):
    rows = [Labelled(*one[:3]) for one in LISTS]
    wanted, asked, fails = with_vectors(), [], [True]
    real = Embedding.embed

    def counted(self, texts, model, query=False):
        asked.extend((one, query) for one in texts)
        if len(asked) > 5 and fails[0]:
            raise KeyboardInterrupt
        return real(self, texts, model, query)

    monkeypatch.setattr(Embedding, "embed", counted)
    monkeypatch.setattr(_train_judge, "EMBEDDED", 2)
    with pytest.raises(KeyboardInterrupt):
        _train_judge._embed(rows, [0, 1, 2], Embedding(), TEACHER, Journal(tmp_path / "v.jsonl"), "x")
    held, fails[0] = len((tmp_path / "v.jsonl").read_text().splitlines()), False
    _train_judge._embed(rows, [0, 1, 2], Embedding(), TEACHER, Journal(tmp_path / "v.jsonl"), "x")
    assert held == 5 and len(asked) == 5 + 2 + 5  # the 3 queries and 7 passages, and what was being asked when it was killed
    for one, other in zip(rows, wanted, strict=True):
        torch.testing.assert_close(one.vectors, other.vectors, atol=1e-5, rtol=0)
        assert one.grades == other.grades
    asked.clear()
    _train_judge._embed(rows, [0, 1, 2], Embedding(), TEACHER, Journal(tmp_path / "v.jsonl"), "x")
    assert not asked
    assert set(json.loads((tmp_path / "v.jsonl").read_text().splitlines()[0])) == {"key", "value"}


def test_settings_and_errors():
    check(VectorMSE())
    assert text(parse("vector_mse(judge=embedding(layer=2))", "rank")) == "vector_mse(judge=embedding(layer=2))"
    with pytest.raises(SmeltError, match="is no embedding"):
        VectorMSE(judge=None)
    with pytest.raises(SmeltError, match=r"give its stage 'train: \{teacher: FOLDER\}'"):
        VectorMSE().collate(LISTS, loaded(), 200)
    judge, model, lists = VectorMSE(), loaded(), with_vectors(width=8)
    with pytest.raises(SmeltError, match="cannot be those of a teacher with 8"):
        judge.loss(model.model, None, judge.collate(lists, model, 200))
    other = Loaded(tiny("llama"), tiny_tokenizer(), Path())
    with pytest.raises(SmeltError, match=r"labels=bm25\(\) has none; one that has is embedding\(\)"):
        _train_judge._embed([Labelled("q", ["p"], [1.0])], [0], parse("bm25()", "rank"), other, None, "x")
