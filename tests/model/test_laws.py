"""What holds for every source of a new model, whatever it is called."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from smelt import registry
from smelt.model._load import same_tokenizer
from smelt.recipe import corpus

NAMES = registry.names("model")
SMALL = {"layers": 2, "hidden": 64, "ffn": 48, "heads": 2, "kv_heads": 1, "vocab": 300, "context": 32}  # where a source has the field


@pytest.fixture
def make(tmp_path):
    lines = [json.dumps({"text": f"def f{i}(x):\n    return x * {i}\n"}) for i in range(300)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))

    def made(name):
        cls = registry.load("model", name)
        given = SMALL | {"data": corpus(str(tmp_path))}
        return registry.build(cls, {f.name: given[f.name] for f in dataclasses.fields(cls) if f.name in given}, name)

    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_makes_the_same_model_and_no_other_randomness_is_touched(name, make):
    before = torch.random.get_rng_state()
    (a, first), (b, second), (c, _) = (make(name).create(seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert same_tokenizer(first, second)
    a, b, c = (model.state_dict() for model in (a, b, c))
    assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
    if make(name) != make(name).__class__():  # has settings of its own, so it is made and not read from a file
        assert any(not torch.equal(a[k], c[k]) for k in a)


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_fits_and_the_model_computes(name, make):
    model, tokenizer = make(name).create(0)
    assert tokenizer.eos_token_id is not None and max(tokenizer.get_vocab().values()) < model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([tokenizer("def f(x):\n    return x", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    assert logits.shape[:2] == ids.shape and torch.isfinite(logits).all()


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_recipe_text_says(name, make):
    assert registry.parse(registry.text(make(name)), "model") == make(name)
