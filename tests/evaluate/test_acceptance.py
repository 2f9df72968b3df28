from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.distill.total_variation import TotalVariation
from smelt.evaluate._score import windows
from smelt.evaluate._text import choose, encode
from smelt.evaluate.acceptance import Acceptance, block_efficiency, overlap
from smelt.evaluate.agreement import Agreement
from smelt.model._load import Loaded
from smelt.model._tiny import tiny
from smelt.runtime import bind
from smelt.spec import SmeltError

SIZES = {"tokens": 160, "document": 60, "context": 40, "stride": 16, "batch": 3, "prefill": 16, "chunk": 8}
SMALL = Acceptance(**SIZES)


def slow(variant, temperature):
    """Of each document, one position and one token of the vocabulary after the other."""
    kept = []
    for document in choose(variant.data, SMALL.tokens, SMALL.document):
        ids = encode(variant.tokenizer, document.text).ids
        total = 0.0
        for first, last, done in windows(len(ids), SMALL.context, SMALL.stride):
            with torch.no_grad():
                row = torch.tensor([ids[first:last]])
                p, q = (
                    (m(input_ids=row).logits[0].double() / temperature).softmax(-1).tolist() for m in (variant.teacher.model, variant.model)
                )
            total += sum(min(a, b) for at in range(done - first - 1, last - first) for a, b in zip(p[at], q[at], strict=True))
        kept.append(total)
    return kept


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_equals_a_slow_loop(variant, temperature):
    rate, block = dataclasses.replace(SMALL, temperature=temperature, length=3)(variant)
    kept = slow(variant, temperature)
    np.testing.assert_allclose(rate.samples, kept, rtol=1e-5)
    tokens = [len(encode(variant.tokenizer, d.text).ids) - 1 for d in choose(variant.data, SMALL.tokens, SMALL.document)]
    assert list(rate.weights) == tokens
    a = sum(kept) / sum(tokens)
    assert rate.value == pytest.approx(a, rel=1e-5)
    assert block.value == pytest.approx((1 - a**4) / (1 - a), rel=1e-5)


def test_is_one_less_the_total_variation():
    target, draft = (3 * torch.randn(50, 31, dtype=torch.float64) for _ in range(2))
    for temperature in (0.7, 1.0, 3.0):
        distance = TotalVariation()(student=draft / temperature, teacher=target / temperature)
        torch.testing.assert_close(overlap(target, draft, temperature), 1 - distance, rtol=0, atol=1e-6)


def test_greedy_is_the_share_of_equal_first_choices(variant):
    greedy = dataclasses.replace(SMALL, temperature=0.0)(variant)[0]
    top = Agreement(**SIZES)(variant)[1]
    assert greedy.samples == top.samples and greedy.weights == top.weights
    cold = dataclasses.replace(SMALL, temperature=1e-6)(variant)[0]
    np.testing.assert_allclose(cold.samples, top.samples, atol=1e-6)


@pytest.mark.parametrize("length", [1, 5])
def test_tokens_per_call(length):
    for a in (0.0, 0.3, 0.999):
        assert block_efficiency(a, length) == pytest.approx((1 - a ** (length + 1)) / (1 - a))
    assert block_efficiency(1.0, length) == length + 1


def test_a_model_accepts_all_it_drafts_itself(variant):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    rate, block = SMALL(variant)
    assert rate.value == pytest.approx(1, abs=1e-5) and block.value == pytest.approx(SMALL.length + 1, abs=1e-4)


def test_reads_the_draft_through_its_cache_and_the_target_without(variant, measured):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    for name in registry.names("cache"):
        cls = registry.load("cache", name)
        for method, lossy in ((measured(cls.unlimited()), False), (measured(cls.example()), not cls.keeps_all or None)):
            variant.cache = method
            with bind(variant.model, cache=method):
                assert (SMALL(variant)[0].value < 1 - 1e-5) == lossy or lossy is None, name


def test_heads_of_different_width_are_compared_on_what_both_have(variant):
    wide = tiny("llama", hidden=128, heads=4, kv_heads=2, context=512, seed=1, vocab=384)
    with torch.no_grad():
        for mine, other in zip(wide.parameters(), variant.teacher.model.parameters(), strict=True):
            mine[: other.shape[0]] = other
    expected = SMALL(variant)
    variant.teacher = Loaded(wide, variant.tokenizer, Path())
    for a, b in zip(SMALL(variant), expected, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)


def test_what_is_refused(variant, monkeypatch):
    with pytest.raises(SmeltError, match="stride=65"):
        Acceptance(context=64, stride=65)
    with pytest.raises(SmeltError, match="do not share a tokenizer"):
        with monkeypatch.context() as patch:
            patch.setattr("smelt.evaluate._beside.same_tokenizer", lambda *_: False)
            SMALL(variant)
    teacher, variant.teacher = variant.teacher, None
    with pytest.raises(SmeltError, match="needs a teacher"):
        SMALL(variant)
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    variant.attention = registry.load("attention", registry.names("attention")[0])()
    with pytest.raises(SmeltError, match="load the teacher apart"):
        SMALL(variant)
    variant.teacher = teacher
