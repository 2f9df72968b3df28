from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.evaluate import Variant
from smelt.evaluate.memory import Memory, Working, held
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind


def named(metrics):
    return {m.name: m.value for m in metrics}


def test_each_storage_is_counted_once_with_all_it_holds():
    base = torch.zeros(100)
    assert held([base, base[:10], base.view(10, 10)]) == 400
    assert held([base[:1]]) == 400
    assert held([base, torch.zeros(3, dtype=torch.int8)]) == 403


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_bytes_of_distinct_parameters_and_buffers(tied, made):
    model = tiny("llama", tie_word_embeddings=tied)
    found = named(Memory(tokens=32)(Variant("v", model, tiny_tokenizer(), data=made())))
    distinct = {p.data_ptr(): p.numel() for p in model.parameters()}
    buffers = {b.data_ptr(): b.numel() for b in model.buffers()}
    assert found["parameters"] == sum(distinct.values())
    assert found["weight_bytes"] == 4 * (sum(distinct.values()) + sum(buffers.values()))


def test_half_precision_weighs_half(made):
    variants = [Variant("v", tiny("llama").to(d), tiny_tokenizer(), data=made()) for d in (torch.float32, torch.bfloat16)]
    full, half = (named(Memory(tokens=32)(variant)) for variant in variants)
    assert half["weight_bytes"] < 0.51 * full["weight_bytes"]
    assert half["cache_bytes_per_token"] == 0.5 * full["cache_bytes_per_token"]


def test_without_a_method_a_token_costs_two_vectors_a_layer(variant):
    assert named(Memory(tokens=100)(variant))["cache_bytes_per_token"] == 2 * 2 * 2 * 32 * 4  # layers, k and v, heads, width, bytes


@pytest.mark.parametrize("name", registry.names("cache"))
def test_a_cache_method_holds_what_its_formula_says(variant, name, measured):
    method = measured(registry.load("cache", name).example())
    variant.cache = method
    with bind(variant.model, cache=method):
        found = named(Memory(tokens=100)(variant))
    assert found["cache_bytes_per_token"] == method.bytes_held(variant.model.config, 100) / 100


def test_the_peak_is_the_most_alive_at_one_time():
    size, weight = 4000, torch.zeros(1000)
    with Working(weight.device, [weight]) as seen:
        a = weight + 1  # 1
        b = a * 2  # 2
        c = b.view(10, 100)  # still 2
        del b
        d = torch.cat([a, c.flatten()])  # 2 + 2
        assert seen.now == seen.peak == 4 * size
        del a, c
        assert seen.now == 2 * size
        e = d + d  # 2 + 2
        del d, e
        weight.add_(1)
        assert seen.now == 0 and seen.peak == 4 * size
    weight.mul(2)
    assert seen.peak == 4 * size


def test_peak_grows_by_the_logits_and_cache_of_a_longer_prompt(variant):
    """Between the bounds of what must be alive (the cache) and of what the layers make in all."""
    short, long = (named(Memory(tokens=n)(variant)) for n in (64, 256))
    cache = 2 * 2 * 2 * 32 * 4
    rise = (long["peak_bytes"] - short["peak_bytes"]) / 192
    hidden, ffn = 128 * 4, 96 * 4
    assert cache + 2 * hidden <= rise <= cache + 8 * hidden + 4 * ffn
    assert long["peak_bytes"] > long["weight_bytes"]


def test_the_prompt_gives_way_to_a_short_context(made):
    found = named(Memory(tokens=4000)(Variant("v", tiny("llama", context=64), tiny_tokenizer(), data=made())))
    assert found["cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
