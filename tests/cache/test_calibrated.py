"""The helper smelt/cache/_calibrated.py with a method that measures the mean key of each layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from smelt import registry
from smelt.cache._calibrated import Calibrated
from smelt.model._tiny import tiny
from smelt.spec import SmeltError


@dataclass(frozen=True)
class MeanKey(Calibrated):
    weights: Any = None

    @classmethod
    def unlimited(cls):
        return cls()

    example = unlimited

    def fits(self, config):
        return None

    def layer(self, config, index):
        return self.state(config, index)["key"]

    def bytes_held(self, config, prompt, written=0, itemsize=4, batch=1):
        return 0

    def measure(self, model, batches):
        past = DynamicCache()
        with torch.no_grad():
            model(torch.cat(list(batches)), past_key_values=past)
        return {f"{i}.key": layer.keys.mean((0, 2)) for i, layer in enumerate(past.layers)}


@pytest.fixture
def named(monkeypatch):
    monkeypatch.setattr(registry, "name_of", lambda method: ("cache", "mean_key"))
    monkeypatch.setattr(registry, "text", lambda method: "mean_key()")


def test_what_was_measured_is_read_by_layer(tmp_path, named):
    model, ids = tiny("llama"), torch.randint(2, 300, (2, 20))
    with pytest.raises(SmeltError, match="mean_key has to be measured on text first"):
        MeanKey().layer(model.config, 0)
    method = MeanKey().calibrated(model, [ids], tmp_path / "a")
    wanted = method.measure(model, [ids])
    for index in (0, 1):
        assert torch.equal(method.layer(model.config, index), wanted[f"{index}.key"])
    assert not torch.equal(method.layer(model.config, 0), method.layer(model.config, 1))
    with pytest.raises(SmeltError, match="measured on a model of other sizes"):
        method.layer(tiny("llama", layers=3).config, 0)


def test_a_file_of_another_method_and_a_broken_one_are_refused(tmp_path, named, monkeypatch):
    model = tiny("llama")
    method = MeanKey().calibrated(model, [torch.randint(2, 300, (1, 9))], tmp_path)
    monkeypatch.setattr(registry, "name_of", lambda method: ("cache", "other"))
    with pytest.raises(SmeltError, match="measured for the method 'mean_key', not for other"):
        method.layer(model.config, 0)
    (tmp_path / "cache.safetensors").write_bytes(b"nothing")
    with pytest.raises(SmeltError, match="cannot be read"):
        method.layer(model.config, 0)
