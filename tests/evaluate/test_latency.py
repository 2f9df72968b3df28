from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.evaluate import Variant
from smelt.evaluate import latency as module
from smelt.evaluate.latency import Latency
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind
from smelt.spec import SmeltError

SMALL = Latency(prompt=30, new=12)


@pytest.fixture
def clock(monkeypatch, variant):
    """Time passes only inside the model: `seconds(positions)` a call."""
    now = [0.0]
    monkeypatch.setattr(module, "_now", lambda model: now[0])

    def spend(model, args, kwargs):
        positions = kwargs["input_ids"].shape[1]
        now[0] += 0.5 * positions if positions > 1 else 0.25

    handle = variant.model.register_forward_pre_hook(spend, with_kwargs=True)
    yield
    handle.remove()


def named(metrics):
    return {m.name: m.value for m in metrics}


def test_rates_are_tokens_over_the_time_of_their_calls(variant, clock):
    found = named(SMALL(variant))
    assert found["prefill_tokens_per_s"] == pytest.approx(1 / 0.5)
    assert found["first_token_s"] == pytest.approx(30 * 0.5)
    assert found["decode_tokens_per_s"] == pytest.approx(1 / 0.25)
    assert found["tokens_per_call"] == 1.0


@pytest.mark.parametrize("name", registry.names("cache"))
def test_a_bound_cache_is_used_by_the_prefill_and_by_generate(variant, name, clock, measured):
    method, kinds = measured(registry.load("cache", name).example()), []
    variant.cache = method
    handle = variant.model.register_forward_pre_hook(lambda m, a, k: kinds.append(type(k["past_key_values"]).__name__), with_kwargs=True)
    with bind(variant.model, cache=method):
        assert named(SMALL(variant))["decode_tokens_per_s"] == pytest.approx(1 / 0.25)
    handle.remove()
    assert set(kinds) == {"MethodCache"}


def test_every_variant_makes_the_same_number_of_tokens(tokenizer, made):
    """Also a model that would end at once: its end of text is the likeliest token everywhere."""
    model = tiny("llama", context=128)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] *= 100
    variant = Variant("v", model, tokenizer, data=made())
    ids = torch.randint(2, 300, (20, 10))
    assert (model(ids).logits[:, -1].argmax(-1) == 0).any()
    lengths = []
    inner = model.generate
    model.generate = lambda *a, **k: lengths.append(inner(*a, **k)) or lengths[-1]
    SMALL(variant)
    assert lengths[-1].shape == (1, 42) and not (lengths[-1][0, 30:] == 0).any()


@pytest.mark.parametrize("name", registry.names("decode"))
def test_tokens_per_call_counts_calls_of_the_target(variant, name, tmp_path):
    save(variant.model, variant.tokenizer, tmp_path)
    method, calls = registry.load("decode", name).example(tmp_path), []
    with bind(variant.model, decode=method, tokenizer=variant.tokenizer):
        variant.decode = method
        inner = variant.model.model.forward
        variant.model.model.forward = lambda *a, **k: calls.append(1) or inner(*a, **k)
        try:
            found = named(Latency(prompt=60, new=24)(variant))
            new_of_warming = 2
        finally:
            del variant.model.model.forward
    total = len(calls) - 1  # the prefill of its own
    assert 24 / total <= found["tokens_per_call"] <= 24 / (total - new_of_warming)
    assert 1.0 <= found["tokens_per_call"] <= 24


def test_a_draft_equal_to_the_target_is_always_accepted(variant, tmp_path):
    """length + 1 tokens a call: ceil(new / (length + 1)) calls."""
    save(variant.model, variant.tokenizer, tmp_path)
    method = registry.parse(f"speculative(draft={str(tmp_path)!r}, length=3)", "decode")
    with bind(variant.model, decode=method, tokenizer=variant.tokenizer):
        found = named(Latency(prompt=30, new=16)(variant))
    assert found["tokens_per_call"] == pytest.approx(16 / 4)


def test_the_prompt_gives_way_to_a_short_context(made):
    variant = Variant("v", tiny("llama", context=32), tiny_tokenizer(), data=made())
    seen = []
    handle = variant.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    Latency(prompt=500, new=8)(variant)
    handle.remove()
    assert max(seen) == 24
    with pytest.raises(SmeltError, match="new=32"):
        Latency(prompt=1, new=32)(variant)


def test_generation_that_ends_early_is_refused(variant, monkeypatch):
    monkeypatch.setattr(variant.model, "generate", lambda ids, **k: ids[:, :20], raising=False)
    with pytest.raises(SmeltError, match="where 12 were asked for"):
        SMALL(variant)
