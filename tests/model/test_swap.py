from __future__ import annotations

import json
from typing import ClassVar

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from smelt.model import _swap
from smelt.model._load import load, save
from smelt.model._swap import SwappedLinear, put, swapped
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError


class Half(SwappedLinear):
    owner: ClassVar[str] = "weights.half"

    def __init__(self, in_features, out_features, bias=None, factor=0.5):
        super().__init__(in_features, out_features, bias)
        self.weight, self.factor = nn.Parameter(torch.zeros(out_features, in_features)), factor

    def settings(self):
        return {"factor": self.factor}

    @classmethod
    def build(cls, was, *, factor):
        return cls(was.in_features, was.out_features, was.bias, factor)

    def product(self, x):
        return self.factor * (x @ self.weight.mT)

    def dense(self):
        return self.factor * self.weight


class Halving:
    module = Half


@pytest.fixture
def halved(monkeypatch):
    monkeypatch.setattr(_swap.registry, "names", lambda family: ["half"])
    monkeypatch.setattr(_swap.registry, "load", lambda family, name: Halving)
    model = tiny("qwen2")  # its q, k, v have biases
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        was = model.get_submodule(name)
        made = Half(was.in_features, was.out_features, was.bias)
        made.weight.data = 2 * was.weight.data
        put(model, name, made)
    return model


def test_a_checkpoint_with_modules_of_our_own_comes_back_as_it_was(halved, tmp_path):
    save(halved, tiny_tokenizer(), tmp_path)
    back = load(tmp_path).model
    assert [name for name, _ in swapped(back)] == [name for name, _ in swapped(halved)] and len(list(swapped(back))) == 2
    ids = torch.arange(10)[None]
    assert torch.equal(back(ids).logits, halved(ids).logits)
    assert torch.allclose(back(ids).logits, tiny("qwen2")(ids).logits, atol=1e-5)
    assert back.generation_config.to_dict() == halved.generation_config.to_dict()
    assert back.generate(ids, max_new_tokens=4, do_sample=False).shape[1] == 14


def test_tied_embeddings_stay_tied(halved, tmp_path):
    assert halved.config.tie_word_embeddings
    save(halved, tiny_tokenizer(), tmp_path)
    back = load(tmp_path).model
    assert back.get_output_embeddings().weight is back.get_input_embeddings().weight


def test_plain_transformers_refuses_it_by_name(halved, tmp_path):
    save(halved, tiny_tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="smelt"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda c: c["smelt"].pop("modules"), "does not list"),
        (lambda c: c["smelt"]["modules"].update({"model.layers.0.mlp.up_proj": ["weights.nothing", {}]}), "no such module"),
        (lambda c: c["smelt"]["modules"].update({"model.layers.9.mlp.up_proj": ["weights.half", {"factor": 1}]}), "cannot be built"),
        (lambda c: c["smelt"]["modules"].update({"model.layers.0.mlp.up_proj": ["weights.half", {"other": 1}]}), "cannot be built"),
        (lambda c: c["smelt"].update(model_type="smelt"), "does not list"),
        (lambda c: c.pop("smelt"), "does not list"),
    ],
)
def test_malformed_descriptions_are_refused_in_one_line(halved, tmp_path, change, says, monkeypatch):
    save(halved, tiny_tokenizer(), tmp_path)
    monkeypatch.setattr(_swap.registry, "names", lambda family: ["half"] if family == "weights" else [])
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SmeltError, match=says):
        load(tmp_path)


def test_weights_that_are_missing_are_named(halved, tmp_path):
    save(halved, tiny_tokenizer(), tmp_path)
    from safetensors.torch import load_file, save_file

    held = load_file(tmp_path / "model.safetensors")
    del held["model.layers.0.self_attn.q_proj.weight"]
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmeltError, match="1 missing weights"):
        load(tmp_path)
