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
from smelt.rank._training import FILE, order_places, read, write
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
