"""The helper smelt/_train_convert.py with the plainest mixer that can learn: a weighted mean of the values so far."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from smelt import registry
from smelt._train_convert import convert
from smelt.attention._mixer import Converting, MixerModule, Transferring
from smelt.data import Document
from smelt.data._tokens import Tokens, tokenize
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import attention_of, blocks
from smelt.recipe import Training
from smelt.spec import SmeltError


class Mean(MixerModule):
    def __init__(self, was):
        super().__init__(was)
        self.v_proj, self.o_proj, self.groups = was.v_proj, was.o_proj, was.num_key_value_groups
        self.scale = nn.Parameter(torch.zeros(was.v_proj.out_features))

    def settings(self):
        return {}

    @classmethod
    def build(cls, was):
        return cls(was)

    def mix(self, hidden, angles, state, real):
        value = (self.v_proj(hidden) * self.scale).cumsum(1) / torch.arange(1, hidden.shape[1] + 1)[:, None]
        return self.o_proj(value.unflatten(-1, (-1, 32)).repeat_interleave(self.groups, 2).flatten(2))


class Plain(Converting):
    layers = None

    def mixer(self, was, config):
        return Mean(was)

    def state_bytes(self, config, tokens, batch=1, itemsize=4):
        return 0

    @classmethod
    def example(cls):
        return cls()


class Taught(Transferring):
    layers = (0,)
    mixer, state_bytes, example = Plain.mixer, Plain.state_bytes, Plain.example

    def learned(self, module):
        return [module.scale]

    def lost(self, module, was, hidden, angles, progress):
        with torch.no_grad():
            wanted, _ = was(hidden, angles, None)
        return (module.mix(hidden, angles, None, None) - wanted).pow(2).mean(-1)


class Text:
    def documents(self, split):
        for i in range(60):
            yield Document(f"d{i}", f"def f{i}(x):\n    return x + {i} * {i % 7}\n" * 4)

    def digest(self):
        return "text"


@pytest.fixture
def tokens(tmp_path):
    tokenize(Text(), "train", tiny_tokenizer(), tmp_path / "tokens")
    return Tokens(tmp_path / "tokens")


@pytest.fixture(autouse=True)
def named(monkeypatch):
    monkeypatch.setattr(registry, "text", lambda method: type(method).__name__.lower() + "()")


SETTINGS = Training(data=None, tokens=64 * 4 * 40, context=64, batch=4, lr=3e-2, warmup=0.0)


def test_only_what_is_learned_changes_and_the_mixer_comes_nearer(tmp_path, tokens):
    loaded = Loaded(tiny("llama"), tiny_tokenizer(), None)
    before = {name: p.clone() for name, p in loaded.model.named_parameters()}
    log = convert(loaded, tokens, Taught(), SETTINGS, tmp_path / "run")
    assert log["log"][-1]["loss"] < 0.95 * log["log"][0]["loss"] and log["report"] == {"converted": [0], "trained": 32}
    kinds = [isinstance(attention_of(block), Mean) for block in blocks(loaded.model)]
    assert kinds == [True, False]
    after = dict(loaded.model.named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before if name in after)
    assert attention_of(blocks(loaded.model)[0]).scale.abs().sum() > 0
    assert all(p.requires_grad for p in loaded.model.parameters())


def test_without_settings_it_only_puts_the_mixers_in(tmp_path):
    loaded = Loaded(tiny("llama"), tiny_tokenizer(), None)
    assert convert(loaded, None, Plain(), None, tmp_path)["report"] == {"converted": [0, 1]}
    assert all(isinstance(attention_of(block), Mean) for block in blocks(loaded.model))


@pytest.mark.parametrize(
    ("method", "more", "what"),
    [
        (Plain(), {}, "plain\\(\\) has no stage of its own"),
        (Taught(), {"teacher": "base"}, "leave out 'teacher'"),
        (Taught(), {"boundaries": "mask"}, "whole rows"),
        (Taught(), {"context": 100_000}, "longer than the positions"),
        (Taught(), {"shard": "fsdp2"}, "one process"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(tmp_path, tokens, method, more, what):
    from dataclasses import replace

    loaded = Loaded(tiny("llama"), tiny_tokenizer(), None)
    with pytest.raises(SmeltError, match=what):
        convert(loaded, tokens, method, replace(SETTINGS, **more), tmp_path / "run")
    assert not any(isinstance(attention_of(block), Mean) for block in blocks(loaded.model))
