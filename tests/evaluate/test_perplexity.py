from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.evaluate import Variant
from smelt.evaluate._text import choose, encode
from smelt.evaluate.perplexity import Perplexity
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.runtime import bind, new_cache
from smelt.spec import SmeltError

SMALL = Perplexity(tokens=240, document=60, context=40, stride=16, batch=3, prefill=16, chunk=1)
CACHES = [registry.load("cache", name) for name in registry.names("cache")]


def named(metrics):
    return {m.name: m for m in metrics}


def slow(variant, probe):
    """Bits of each document, token by token: find the window a token is predicted in, feed what comes before it."""
    model, found = variant.model, []
    for document in choose(variant.data, probe.tokens, probe.document):
        ids, bits = encode(variant.tokenizer, document.text).ids, 0.0
        state = (None, None, None)  # window, cache, tokens fed
        for at in range(1, len(ids)):
            first = next(s for s in range(0, len(ids), probe.stride) if at <= s + probe.context)
            with torch.no_grad():
                if variant.cache is None:
                    scores = model(input_ids=torch.tensor([ids[first:at]])).logits[0, -1]
                else:
                    if state[0] != first:
                        state = (first, new_cache(model, variant.cache), [])
                        prompt = ids[first : first + probe.prefill]
                        out = model(input_ids=torch.tensor([prompt]), past_key_values=state[1], use_cache=True).logits[0]
                        state[2].extend(out)
                    while len(state[2]) < at - first:
                        token = torch.tensor([[ids[first + len(state[2])]]])
                        state[2].append(model(input_ids=token, past_key_values=state[1], use_cache=True).logits[0, -1])
                    scores = state[2][at - first - 1]
            bits -= float(scores.double().log_softmax(-1)[ids[at]]) / math.log(2)
        found.append(bits)
    return found


def test_equals_a_slow_loop_over_tokens(variant):
    found, bits = named(SMALL(variant)), slow(variant, SMALL)
    texts = [d.text for d in choose(variant.data, 240, 60)]
    sizes = [len(t.encode()) for t in texts]
    tokens = sum(len(variant.tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts)
    np.testing.assert_allclose(found["bits_per_byte"].samples, bits, rtol=1e-5)
    assert list(found["bits_per_byte"].weights) == sizes and len(sizes) > 2
    assert found["bits_per_byte"].value == pytest.approx(sum(bits) / sum(sizes), rel=1e-5)
    assert found["perplexity"].value == pytest.approx(2 ** (sum(bits) / tokens), rel=1e-5)


@pytest.mark.parametrize("cls", CACHES)
def test_through_a_cache_equals_a_slow_loop_through_that_cache(variant, cls, measured):
    variant.model = copy.deepcopy(variant.model).double()  # caches that choose rows choose others where scores tie but for rounding
    variant.cache, two = measured(cls.example()), replace(SMALL, tokens=100)  # documents of 60
    with bind(variant.model, cache=variant.cache):
        found = named(two(variant))
        assert len(found["bits_per_byte"].samples) == 2
        np.testing.assert_allclose(found["bits_per_byte"].samples, slow(variant, two), rtol=1e-4)


@pytest.mark.parametrize("cls", CACHES)
def test_a_cache_that_loses_nothing_changes_nothing_and_one_that_does_shows(variant, cls, measured):
    probe = Perplexity(tokens=1000, document=300, context=256, stride=128, prefill=32, chunk=8)
    plain = named(probe(variant))["bits_per_byte"].value
    values = {}
    for kind, method in (("unlimited", measured(cls.unlimited())), ("example", measured(cls.example()))):
        with bind(variant.model, cache=method):
            bound = Variant("v", variant.model, variant.tokenizer, cache=method, data=variant.data)
            values[kind] = named(probe(bound))["bits_per_byte"].value
    assert values["unlimited"] == pytest.approx(plain, rel=1e-5)
    assert cls.keeps_all or abs(values["example"] / plain - 1) > 1e-5  # some of those that keep all act on single tokens only


@pytest.mark.parametrize("cached", [False, True])
def test_does_not_depend_on_the_batch(variant, cached):
    method = registry.load("cache", "kivi").example() if cached else None
    variant.cache = method
    found = []
    with bind(variant.model, cache=method):
        for batch in (1, 2, 50):
            probe = Perplexity(tokens=800, document=150, context=64, stride=32, prefill=16, chunk=8, batch=batch)
            found.append(named(probe(variant))["bits_per_byte"].samples)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5)


def test_by_position_sums_the_tokens_it_names(made):
    model, tokenizer = tiny("llama", layers=1, context=2048), tiny_tokenizer()
    variant = Variant("v", model, tokenizer, data=made(count=3, lines=80))
    probe = Perplexity(tokens=10_000, document=5_000, by_position=True)
    found = named(probe(variant))
    expected = {"first": [], "late": []}
    for document in choose(variant.data, 10_000, 5_000):
        ids = encode(tokenizer, document.text).ids
        assert len(ids) > 1025
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids[:2048]])).logits[0].double().log_softmax(-1)
        text = [len(t) for t in tokenizer.convert_ids_to_tokens(ids[1:])]
        for name, low, high in (("first", 0, 128), ("late", 1024, 2048)):
            places = [i for i in range(low, high) if i < len(text) and i < 2048]
            bits = -sum(float(scores[i, ids[i + 1]]) for i in places) / math.log(2)
            expected[name].append((bits, sum(text[i] for i in places)))
    for name, parts in expected.items():
        np.testing.assert_allclose(found[f"bits_per_byte_{name}"].samples, [p[0] for p in parts], rtol=1e-4)
        assert list(found[f"bits_per_byte_{name}"].weights) == [p[1] for p in parts]


def test_by_position_refuses_short_documents_and_contexts(variant):
    with pytest.raises(SmeltError, match="2,048"):
        Perplexity(tokens=500, by_position=True)(variant)


def test_without_a_start_token_the_first_token_is_given(variant):
    variant.tokenizer = copy.deepcopy(variant.tokenizer)
    variant.tokenizer.bos_token = variant.tokenizer.eos_token = None
    found = named(SMALL(variant))["bits_per_byte"]
    for document, size in zip(choose(variant.data, 240, 60), found.weights, strict=True):
        first = variant.tokenizer(document.text)["input_ids"][0]
        assert size == len(document.text.encode()) - len(variant.tokenizer.convert_ids_to_tokens(first))
    np.testing.assert_allclose(found.samples, slow(variant, SMALL), rtol=1e-5)


def test_the_context_ends_with_the_model(made, tokenizer):
    variant = Variant("v", tiny("llama", context=40), tokenizer, data=made())
    short, asked = Perplexity(tokens=300, context=40, stride=20), Perplexity(tokens=300, context=2048, stride=20)
    assert named(asked(variant)) == named(short(variant))


def test_a_stride_that_leaves_tokens_out_is_refused():
    with pytest.raises(SmeltError, match="stride=65"):
        Perplexity(context=64, stride=65)
