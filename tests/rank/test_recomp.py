from __future__ import annotations

import math

import pytest
import torch

from helpers.rank import loaded
from smelt.rank import Asked
from smelt.rank._training import Labelled
from smelt.rank.embedding import Embedding
from smelt.rank.recomp import Recomp, clear, sentences
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

LISTS = [  # the first passage is not the one that helps most
    Labelled("import os", ["x + 1", "os.listdir(1)", "x + 1.5"], [-3.0, -1.0, -1.05]),
    Labelled("def f(x):", ["print(name)", "pass", "return x + 1"], [-2.0, -2.5, -0.5]),
    Labelled("class A:", ["pass # A", "import os"], [-1.0, -2.0]),
]
BEST = [1, 2, 0]


def test_the_positive_is_the_best_and_what_is_nearly_as_good_is_left_out():
    assert clear(LISTS[0], 0.1) == Labelled("import os", ["os.listdir(1)", "x + 1"], [-1.0, -3.0])
    assert clear(LISTS[0], 0.0).passages == ["os.listdir(1)", "x + 1", "x + 1.5"]
    assert clear(Labelled("q", ["a", "b", "c"], [1.0, 1.0, 0.0]), 0.0).passages == ["a", "c"]
    assert clear(Labelled("q", ["a", "b"], [1.0, 1.0]), 0.5).passages == ["a"]


def test_sentences_are_lines_and_ends():
    assert sentences("One. Two!  Three?\n\n four 1.5 x.y\r\n") == ["One.", "Two!", "Three?", "four 1.5 x.y"]
    assert sentences(" \n\t") == []


def test_the_loss_is_a_loop_over_products():
    model, judge = loaded(), Recomp()
    batch = judge.collate(LISTS, model, 300)
    with torch.no_grad():
        found = judge.loss(model.model, None, batch)
    lists = [clear(one, judge.gap) for one in LISTS]
    every = [p for one in lists for p in one.passages]
    for at, one in enumerate(lists):
        query = judge.embed([one.query], model, query=True)[0]
        scores = {p: float(query @ judge.embed([p], model)[0]) for p in every}
        expected = math.log(sum(math.exp(s - scores[one.passages[0]]) for s in scores.values()))
        assert float(found[at]) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_training_lowers_the_loss_and_finds_what_helps(architecture):
    model, judge = loaded(architecture), Recomp()
    batch, losses = judge.collate(LISTS, model, 300), []
    assert all(len(value) % len(LISTS) == 0 for value in batch.values())
    model.model.train()
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = judge.loss(model.model, judge.heads(model.model.config), batch)
        assert loss.shape == (len(LISTS),) and loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(float(loss.detach().mean()))
    model.model.eval()
    assert losses[-1] < 0.5 * losses[0]
    asked = [Asked(one.query, one.passages[:2] if one is LISTS[0] else one.passages) for one in LISTS]
    assert [a.order[0] for a in judge.answers(asked, model)] == BEST


def test_what_is_left_are_the_best_sentences_in_their_order():
    model, passages = loaded(), ["import os. x = 1.", "def f(x): return x!\nprint(name)", "", "pass"]
    asked = [Asked("os.listdir", passages), Asked("a name", ["", " "]), Asked("x", [])]
    parts = [s for p in passages for s in sentences(p)]
    score = Recomp().scores([Asked("os.listdir", parts)], model)[0].tolist()
    order = sorted(range(len(parts)), key=lambda i: -score[i])
    for keep in (1, 2, 3, 99):
        expected = " ".join(parts[i] for i in sorted(order[:keep]))
        assert Recomp(keep=keep).compress(asked, model) == [expected, "", ""]
    least = (score[order[0]] + score[order[1]]) / 2
    assert Recomp(keep=3, least=least).compress(asked, model)[0] == parts[order[0]]
    assert Recomp(least=score[order[0]] + 1).compress(asked, model) == ["", "", ""]


def test_what_is_said_to_be_wrong():
    with pytest.raises(SmeltError, match="is no embedding"):
        Recomp(judge=3)
    method = parse("recomp(keep=1, judge=embedding(echo=True))", "rank")
    check(method)
    assert method == Recomp(keep=1, judge=Embedding(echo=True)) and parse(text(method), "rank") == method
