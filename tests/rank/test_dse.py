from __future__ import annotations

import math

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.rank import Asked
from smelt.rank.dse import DSE, distilled
from smelt.rank.embedding import Embedding
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def test_the_loss_is_a_loop():
    scores, grades, keep, good = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) > 0.3, torch.rand(4, 3) > 0.5
    keep[:, 0] = True
    for alpha in (0.0, 0.3, 1.0):
        found = distilled(scores, grades, good, keep, alpha)
        for row in range(4):
            each = []
            for z, t, y, inside in zip(*(x[row].tolist() for x in (scores, grades, good, keep)), strict=True):
                p = 1 / (1 + math.exp(-z))
                each += [(1 - alpha) * -math.log(p if y else 1 - p) + alpha * (z - t) ** 2] * inside
            assert found[row].item() == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_the_square_is_zero_at_the_teacher_and_not_beside_it():
    grades, keep = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    assert distilled(grades, grades, keep, keep, 1.0).tolist() == [0, 0]
    torch.testing.assert_close(distilled(grades + 2, grades, keep, keep, 1.0), torch.full((2,), 4.0))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_vectors_are_the_last_layers_side_by_side(architecture):
    model = loaded(architecture, layers=3)
    (found,) = DSE(layers=2).embed(["import os"], model)
    each = [Embedding(normalize=False, layer=layer).embed(["import os"], model)[0] for layer in (3, 2)]
    torch.testing.assert_close(found, torch.cat(each) / 128**0.25, atol=1e-5, rtol=1e-4)
    assert DSE().embed(["x"], model).shape == (1, 192) and DSE().embed([], model).shape == (0, 192)
    (score,) = DSE(layers=2).scores([Asked("import os", ["x + 1"])], model)
    other = [Embedding(normalize=False, layer=layer).embed(["x + 1"], model)[0] for layer in (3, 2)]
    wanted = sum((a * b).sum() for a, b in zip(each, other, strict=True)) / math.sqrt(128)
    torch.testing.assert_close(score[0], wanted, atol=1e-4, rtol=1e-4)


def test_the_loss_is_that_of_the_scores_it_is_asked_for():
    judge, model = DSE(scale=2.0), loaded()
    with torch.no_grad():
        found = judge.loss(model.model, None, judge.collate(LISTS, model, 200))
    for one, value in zip(LISTS, found, strict=True):
        scores, n = judge.scores([Asked(one.query, one.passages)], model)[0], len(one.passages)
        good = torch.tensor([True] + [False] * (n - 1))
        wanted = distilled(scores, 2.0 * torch.tensor(one.grades), good, torch.ones(n, dtype=torch.bool), 0.5)
        torch.testing.assert_close(value, wanted, atol=1e-4, rtol=1e-4)


def test_training_makes_the_loss_fall_and_the_lists_right():
    judge, model = DSE(), loaded()
    _, losses = taught(judge, model)
    assert losses[-1] < 0.5 * losses[0] and right(judge, model)


def test_settings_and_errors():
    method = parse("dse(layers=2, alpha=1.0, scale=20.0)", "rank")
    assert text(method) == "dse(layers=2, alpha=1.0, scale=20.0)"
    check(method)
    for judge in (Embedding(), Embedding(normalize=False, layer=1), None):
        with pytest.raises(SmeltError, match=r"an embedding\(normalize=False\)"):
            DSE(judge=judge)
    with pytest.raises(SmeltError):
        parse("dse(alpha=1.5)", "rank")
