from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from smelt import registry
from smelt.evaluate import _beside
from smelt.evaluate._score import windows
from smelt.evaluate._text import choose, encode
from smelt.evaluate.agreement import Agreement
from smelt.model._load import Loaded
from smelt.model._tiny import tiny
from smelt.runtime import bind
from smelt.spec import SmeltError

SMALL = Agreement(tokens=160, document=60, context=40, stride=16, batch=3, prefill=16, chunk=8)


def slow(variant):
    """KL and agreement of each document, one position after the other, with loops over the vocabulary sums."""
    far, same = [], []
    for document in choose(variant.data, SMALL.tokens, SMALL.document):
        ids = encode(variant.tokenizer, document.text).ids
        total, equal = 0.0, 0
        for first, last, done in windows(len(ids), SMALL.context, SMALL.stride):
            with torch.no_grad():
                row = torch.tensor([ids[first:last]])
                p, q = (m(input_ids=row).logits[0].double().softmax(-1) for m in (variant.teacher.model, variant.model))
            for at in range(done - first - 1, last - first):
                total += sum(float(a * (a / b).log()) for a, b in zip(p[at], q[at]))
                equal += int(p[at].argmax() == q[at].argmax())
        far.append(total)
        same.append(equal)
    return far, same


@pytest.mark.parametrize("kept", [1 << 29, 0])
def test_equals_a_slow_loop(variant, monkeypatch, kept):
    monkeypatch.setattr(_beside, "KEPT", kept)
    divergence, top = SMALL(variant)
    far, same = slow(variant)
    np.testing.assert_allclose(divergence.samples, far, rtol=1e-4)
    assert list(top.samples) == same
    tokens = [len(encode(variant.tokenizer, d.text).ids) - 1 for d in choose(variant.data, SMALL.tokens, SMALL.document)]
    assert list(divergence.weights) == list(top.weights) == tokens
    assert divergence.value == pytest.approx(sum(far) / sum(tokens), rel=1e-4)


def test_a_model_agrees_with_itself(variant):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    divergence, top = SMALL(variant)
    assert abs(divergence.value) < 1e-6 and top.value == 1.0


def test_reads_the_variant_through_its_cache_and_the_teacher_without(variant, measured):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    for name in registry.names("cache"):
        cls = registry.load("cache", name)
        for method, lossy in ((measured(cls.unlimited()), False), (measured(cls.example()), not cls.keeps_all or None)):
            variant.cache = method
            with bind(variant.model, cache=method):
                assert (SMALL(variant)[0].value > 1e-6) == lossy or lossy is None, name


def test_the_teacher_is_asked_once_for_all_variants_and_again_when_it_changed(variant):
    calls = []
    model = copy.deepcopy(variant.teacher.model)
    variant.teacher = Loaded(model, variant.tokenizer, Path())
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    first = SMALL(variant)
    asked = len(calls)
    assert asked > 0 and SMALL(variant) == first and len(calls) == asked
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    assert SMALL(variant)[0].value != first[0].value and len(calls) == 2 * asked
    handle.remove()


def test_heads_of_different_width_are_compared_on_what_both_have(variant):
    wide = tiny("llama", hidden=128, heads=4, kv_heads=2, context=512, seed=1, vocab=384)
    with torch.no_grad():
        for mine, other in zip(wide.parameters(), variant.teacher.model.parameters(), strict=True):
            mine[: other.shape[0]] = other
    expected = SMALL(variant)
    variant.teacher = Loaded(wide, variant.tokenizer, Path())
    for a, b in zip(SMALL(variant), expected, strict=True):
        assert a.value == pytest.approx(b.value, rel=1e-5)


def test_another_tokenizer_of_equal_size_is_refused(variant):
    other = copy.deepcopy(variant.tokenizer)
    swapped = other.backend_tokenizer.to_str().replace('"e":', '"\x00":').replace('"t":', '"e":').replace('"\x00":', '"t":')
    other._tokenizer = Tokenizer.from_str(swapped)
    assert len(other) == len(variant.tokenizer)
    variant.teacher = Loaded(variant.teacher.model, other, Path())
    with pytest.raises(SmeltError, match="do not share a tokenizer"):
        SMALL(variant)


def test_a_teacher_that_would_answer_through_the_bound_attention_is_refused(variant):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    variant.attention = registry.load("attention", registry.names("attention")[0])()
    with pytest.raises(SmeltError, match="load the teacher apart"):
        SMALL(variant)


def test_no_teacher_is_refused(variant):
    variant.teacher = None
    with pytest.raises(SmeltError, match="needs a teacher"):
        SMALL(variant)
    with pytest.raises(SmeltError, match="stride=65"):
        Agreement(context=64, stride=65)
