from __future__ import annotations

import math

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank.defsent import DefSent, dictionary, guessed
from smelt.rank.embedding import Embedding
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def test_entries_are_means_over_the_other_definitions():
    queries, passages, good = torch.randn(3, 4), torch.randn(6, 4), torch.tensor([[True, False], [True, True], [True, False]])
    found = dictionary(queries, passages, good)
    for row in range(3):
        each = [passages[2 * row + j] for j in range(2) if good[row, j]]
        torch.testing.assert_close(found[row, 0], sum(each) / len(each))
        torch.testing.assert_close(found[row, 1], (queries[row] + sum(each[1:])) / len(each))


def test_guessing_is_a_loop_and_twins_are_left_out():
    definitions, entries, same = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([7, 8, 7, 9])
    for row, value in enumerate(guessed(definitions, entries, same)):
        logit = [math.exp(float(definitions[row] @ entries[j])) for j in range(4)]
        total = sum(logit[j] for j in range(4) if j == row or same[j] != same[row])
        assert float(value) == pytest.approx(-math.log(logit[row] / total), abs=1e-5)


def test_entries_stand_still_while_the_student_learns(tmp_path):
    """They are those of the folder the student came from, whatever became of it."""
    save(tiny("llama"), tiny_tokenizer(), tmp_path)
    model, judge = loaded()._replace(folder=tmp_path), DefSent()
    before = judge.collate(LISTS, model, 200)["entries"]
    raw = Embedding()
    for row, one in enumerate(LISTS):
        q, p = raw.embed([one.query], model, True)[0], raw.embed(one.passages[:1], model)[0]
        torch.testing.assert_close(before[row], torch.stack([p, q]), atol=1e-4, rtol=1e-4)
    _, losses = taught(judge, model)
    assert losses[-1] < 0.6 * losses[0] and right(judge, model)
    assert torch.equal(judge.collate(LISTS, model, 200)["entries"], before)
    here = DefSent().collate(LISTS, model._replace(folder=None), 200)["entries"]
    assert not torch.allclose(here, before) and not here.requires_grad
    named = DefSent(entries=str(tmp_path)).collate(LISTS, model._replace(folder=None), 200)["entries"]
    assert torch.equal(named, before)


def test_vectors_are_unit():
    found = DefSent().embed(["import os", ""], loaded())
    torch.testing.assert_close(found, Embedding().embed(["import os", ""], loaded()))


def test_errors(tmp_path):
    method = parse("defsent(judge=embedding(pool='first', normalize=False, temperature=1.0), entries='base')", "rank")
    assert text(method) == "defsent(judge=embedding(pool='first', normalize=False, temperature=1.0), entries='base')"
    check(method)
    with pytest.raises(SmeltError, match=r"is no embedding"):
        DefSent(judge=None)
    save(tiny("llama", hidden=32), tiny_tokenizer(), tmp_path)
    with pytest.raises(SmeltError, match="32 wide, the student's vectors 64"):
        DefSent(entries=str(tmp_path)).collate(LISTS, loaded(), 200)
