"""The helper smelt/rank/_training.py: what a trained judge's folder says. The loop is tested in tests/test_train.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from smelt import registry
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank._training import FILE, order_places, read, weighted_ranknet, write
from smelt.spec import SmeltError


@dataclass(frozen=True)
class Headed:
    weights: Any = None
    wide: int = 3

    def heads(self, config):
        return nn.Linear(config.hidden_size, self.wide)


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(registry, "name_of", lambda method: ("rank", "headed"))
    monkeypatch.setattr(registry, "text", lambda method: "headed()")


def test_places_are_those_of_a_stable_sort():
    grades = torch.tensor([[0.0, 2.0, 2.0, 1.0], [4.0, 3.0, 2.0, 1.0]])
    assert order_places(grades).tolist() == [[4, 1, 2, 3], [1, 2, 3, 4]]


def slow_ranknet(scores, grades):
    """Pair by pair, of one list."""
    m, total = len(scores), torch.zeros((), dtype=scores.dtype)
    place = {i: r for r, i in enumerate(sorted(range(m), key=lambda i: -grades[i]), 1)}
    for i in range(m):
        for j in range(m):
            if grades[i] > grades[j]:
                total = total + (1 + (scores[j] - scores[i]).exp()).log() / (place[i] + place[j])
    return total / max(m * (m - 1) / 2, 1)


def test_ranknet_is_the_loop_over_pairs():
    torch.manual_seed(0)
    scores, there = torch.randn(4, 6, dtype=torch.float64), torch.arange(6) < torch.tensor([6, 4, 1, 2])[:, None]
    grades = torch.tensor([[0, 5, 2, 2, 1, 4], [3, 2, 1, 0, 9, 9], [1, 9, 9, 9, 9, 9], [1, 1, 0, 0, 0, 0]], dtype=torch.float64)
    expected = torch.stack([slow_ranknet(s[t], g[t].tolist()) for s, g, t in zip(scores, grades, there, strict=True)])
    torch.testing.assert_close(weighted_ranknet(scores, grades, there), expected, atol=1e-12, rtol=1e-12)
    assert expected[:2].min() > 0 and expected[2:].tolist() == [0, 0]


@pytest.mark.parametrize(("m", "value"), [(5, 0.1274), (8, 0.0890), (10, 0.0743), (20, 0.0411)])
def test_ranknet_at_equal_scores_is_finite_and_has_its_value(m, value):
    """log 2 times the mean of 1/(i + j) over pairs; the gradient raises what is better."""
    scores, grades = torch.zeros(m, dtype=torch.float64, requires_grad=True), -torch.arange(m, dtype=torch.float64)
    lost = weighted_ranknet(scores, grades, torch.ones(m, dtype=torch.bool))
    lost.backward()
    assert abs(lost.item() - value) < 5e-5 and scores.grad.isfinite().all()
    assert scores.grad[0] < 0 < scores.grad[-1] and abs(scores.grad.sum()) < 1e-12


def test_ranknet_moves_with_the_passages():
    torch.manual_seed(1)
    scores, grades, by = torch.randn(7, dtype=torch.float64, requires_grad=True), torch.arange(7.0), torch.randperm(7)
    all_there = torch.ones(7, dtype=torch.bool)
    (straight,) = torch.autograd.grad(weighted_ranknet(scores, grades, all_there), scores)
    (moved,) = torch.autograd.grad(weighted_ranknet(scores[by], grades[by], all_there), scores)
    torch.testing.assert_close(moved, straight, atol=1e-12, rtol=1e-12)


def test_heads_come_back_from_the_folder_and_other_ones_are_refused(tmp_path, named, monkeypatch):
    model = Loaded(tiny("llama"), tiny_tokenizer(), tmp_path)
    made = Headed().heads(model.model.config)
    with pytest.raises(SmeltError, match="headed has parameters that have to be trained"):
        read(Headed(), model)
    write(Headed(), made, tmp_path)
    for judge in (Headed(), Headed(weights=str(tmp_path))):
        again = read(judge, model._replace(folder=None) if judge.weights else model)
        assert torch.equal(again.weight, made.weight) and not again.weight.requires_grad and not again.training
    with pytest.raises(SmeltError, match="cannot be read: Error"):
        read(Headed(wide=4), model)
    monkeypatch.setattr(registry, "name_of", lambda method: ("rank", "other"))
    with pytest.raises(SmeltError, match="is of the method 'headed', not of other"):
        read(Headed(), model)


def test_a_method_without_heads_needs_no_file_and_writes_its_name(tmp_path, named):
    class Plain:
        weights = None

        def heads(self, config):
            return None

    model = Loaded(tiny("llama"), tiny_tokenizer(), None)
    assert read(Plain(), model) is None
    write(Plain(), None, tmp_path)
    assert (tmp_path / FILE).is_file()
