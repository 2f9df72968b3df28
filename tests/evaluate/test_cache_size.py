from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.cache._calibrated import Calibrated
from smelt.evaluate import Variant
from smelt.evaluate.cache_size import CacheSize
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind
from smelt.spec import SmeltError

HEADS, WIDTH, LAYERS = 2, 32, 2


def named(metrics):
    return {m.name: m.value for m in metrics}


def test_a_full_cache_holds_what_it_says_and_twice_an_fp16_one_in_fp32(variant):
    found = named(CacheSize(tokens=100, written=5)(variant))
    full = 2 * LAYERS * HEADS * WIDTH * 105
    assert found == {"cache_held_bytes": 4 * full, "cache_formula_bytes": 4 * full, "cache_share_of_fp16": 2.0}


def test_half_precision_has_the_share_one(made):
    found = named(CacheSize(tokens=50)(Variant("v", tiny("llama").to(torch.bfloat16), tiny_tokenizer(), data=made())))
    assert found["cache_share_of_fp16"] == 1.0


@pytest.mark.parametrize("name", [n for n in registry.names("cache") if not issubclass(registry.load("cache", n), Calibrated)])
def test_what_is_held_is_what_the_formula_says(variant, name):
    variant.cache = registry.load("cache", name).example()
    with bind(variant.model, cache=variant.cache):
        found = named(CacheSize(tokens=90, written=7)(variant))
    assert found["cache_held_bytes"] == found["cache_formula_bytes"] == variant.cache.bytes_held(variant.model.config, 90, 7)
    assert found["cache_share_of_fp16"] == found["cache_held_bytes"] / (4 * LAYERS * HEADS * WIDTH * 97)


def test_a_formula_that_is_wrong_shows(variant, monkeypatch):
    variant.cache = registry.load("cache", "sink_window").example()
    monkeypatch.setattr(type(variant.cache), "bytes_held", lambda *a: 7)
    with bind(variant.model, cache=variant.cache):
        found = named(CacheSize(tokens=40, written=0)(variant))
    assert found["cache_formula_bytes"] == 7 != found["cache_held_bytes"]


def test_the_prompt_gives_way_to_the_context_unless_told(made):
    variant = Variant("v", tiny("llama", context=64), tiny_tokenizer(), data=made())
    each = 2 * LAYERS * HEADS * 16 * 4
    assert named(CacheSize(tokens=400)(variant))["cache_held_bytes"] == 64 * each
    assert named(CacheSize(tokens=400, beyond=True)(variant))["cache_held_bytes"] == 416 * each
    with pytest.raises(SmeltError, match="written=64"):
        CacheSize(written=64)(variant)
