from __future__ import annotations

import pytest
import torch

from helpers.rank import LISTS, loaded, right, taught
from smelt.rank import Asked
from smelt.rank.embedding import Embedding
from smelt.rank.margin_mse import MarginMSE, margins
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def test_margins_are_a_loop():
    scores, grades, keep = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5) > 0.3
    keep[:, 0] = True
    keep[3, 1:] = False
    found = margins(scores, grades, keep)
    for row in range(4):
        each = [((scores[row, 0] - scores[row, j]) - (grades[row, 0] - grades[row, j])).item() ** 2 for j in range(1, 5) if keep[row, j]]
        assert found[row].item() == pytest.approx(sum(each) / len(each) if each else 0.0, abs=1e-5)


def test_only_margins_count():
    """Zero at s = t + c; the gradient of the first passage is minus the sum of the others'."""
    grades, keep = torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.bool)
    assert margins(grades + torch.tensor([[1.0], [-7.0], [0.0]], dtype=torch.float64), grades, keep).abs().max() < 1e-24
    scores = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    margins(scores, grades, keep).sum().backward()
    torch.testing.assert_close(scores.grad[:, 0], -scores.grad[:, 1:].sum(1))
    assert scores.grad[:, 0].abs().min() > 0
    assert margins(2 * grades, grades, keep).min() > 0


def test_the_loss_is_that_of_the_scores_it_is_asked_for():
    judge, model = MarginMSE(scale=3.0), loaded()
    with torch.no_grad():
        found = judge.loss(model.model, None, judge.collate(LISTS, model, 200))
    for one, value in zip(LISTS, found, strict=True):
        (s,) = judge.scores([Asked(one.query, one.passages)], model)
        each = [((s[0] - s[j]).item() - 3 * (one.grades[0] - one.grades[j])) ** 2 for j in range(1, len(s))]
        assert value.item() == pytest.approx(sum(each) / len(each), rel=1e-4)
        torch.testing.assert_close(s, judge.judge.scores([Asked(one.query, one.passages)], model)[0])


def test_training_makes_the_loss_fall_and_the_lists_right():
    judge, model = MarginMSE(), loaded()
    _, losses = taught(judge, model)
    assert losses[-1] < 0.2 * losses[0] and right(judge, model)


def test_settings_and_errors():
    method = parse("margin_mse(judge=embedding(normalize=False, layer=2), scale=20.0)", "rank")
    assert text(method) == "margin_mse(judge=embedding(normalize=False, layer=2), scale=20.0)"
    check(method)
    with pytest.raises(SmeltError, match=r"use judge=embedding\(normalize=False\)"):
        MarginMSE(judge=Embedding())
    with pytest.raises(SmeltError, match="is no embedding"):
        MarginMSE(judge=None)
    with pytest.raises(SmeltError):
        parse("margin_mse(scale=0.0)", "rank")
