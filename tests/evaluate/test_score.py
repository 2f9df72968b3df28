from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.evaluate import Variant
from smelt.evaluate._score import batches, log_probabilities, logits, windows
from smelt.evaluate._score import decoder as check
from smelt.evaluate.perplexity import Perplexity
from smelt.evaluate.position import Position
from smelt.model._tiny import ARCHITECTURES, tiny, tiny_tokenizer
from smelt.runtime import new_cache
from smelt.spec import SmeltError

ROWS = [[(7 * i + j * j) % 320 for j in range(n)] for i, n in enumerate((40, 2, 17, 33, 17, 64))]


def slow(model, row):
    """Token by token, each from a call of its own."""
    found = []
    for at in range(1, len(row)):
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([row[:at]])).logits[0, -1]
        found.append(float(scores.double().log_softmax(-1)[row[at]]))
    return np.array(found)


@pytest.mark.parametrize("architecture", [a for a in ARCHITECTURES if a != "bert"])
def test_log_probabilities_are_those_of_a_loop_for_any_batch(architecture):
    model = tiny(architecture)
    expected = [slow(model, row) for row in ROWS[:4]]
    for batch in (1, 3, 100):
        found = log_probabilities(Variant("v", model, None), ROWS[:4], batch=batch, prefill=1, chunk=1)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_only_the_last_positions_are_computed_when_asked(variant):
    whole = log_probabilities(variant, ROWS, batch=3, prefill=1, chunk=1)
    count = [5, 1, 16, 2, 9, 1]
    part = log_probabilities(variant, ROWS, batch=3, prefill=1, chunk=1, last=count)
    for a, b, n in zip(part, whole, count, strict=True):
        np.testing.assert_allclose(a[-n:], b[-n:], rtol=1e-5, atol=1e-5)
        assert not a[:-n].any()


def test_batches_hold_every_row_once_and_keep_to_the_memory(decoder, monkeypatch):
    for limit in (1 << 28, 4 * 320 * 64, 1):
        monkeypatch.setattr("smelt.evaluate._score.LOGITS", limit)
        seen = []
        for part, ids in batches(decoder, ROWS, 4):
            assert len(part) == 1 or (len(part) <= 4 and ids.numel() * 320 * 4 <= limit)
            for place, index in enumerate(part):
                assert ids[place, : len(ROWS[index])].tolist() == ROWS[index]
            seen += part
        assert sorted(seen) == list(range(len(ROWS)))


@pytest.mark.parametrize("length, context, stride", [(2, 4, 2), (50, 8, 8), (50, 8, 3), (51, 10, 1), (9, 20, 5), (21, 20, 7)])
def test_windows_predict_every_position_once_from_enough_tokens(length, context, stride):
    predicted = {}
    for first, last, done in windows(length, context, stride):
        assert first % stride == 0 and last - first <= context
        for position in range(done, last + 1):
            assert position not in predicted
            predicted[position] = position - first
    assert sorted(predicted) == list(range(1, length))
    assert all(min(p, context - stride + 1) <= seen <= context for p, seen in predicted.items())


def test_what_cannot_be_scored_is_refused(decoder):
    with pytest.raises(SmeltError, match="predicts the next token"):
        check(Variant("v", tiny("bert"), tiny_tokenizer()), "perplexity")
    training = tiny("llama").train()
    with pytest.raises(SmeltError, match="training mode"):
        check(Variant("v", training, tiny_tokenizer()), "perplexity")
    assert check(Variant("v", decoder, None), "perplexity") is decoder


def test_a_cache_of_unequal_layers_is_fed_one_token_at_a_time(variant):
    method = registry.load("cache", "kivi").unlimited()
    seen = []
    handle = variant.model.register_forward_pre_hook(lambda m, a, k: seen.append(k["input_ids"].shape[1]), with_kwargs=True)
    ids = torch.tensor([ROWS[0]])
    for equal, expected in ((True, [16, 10, 10, 4]), (False, [16] + [1] * 24)):
        variant.cache = SimpleNamespace(equal_lengths=equal)
        seen.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("smelt.evaluate._score.new_cache", lambda model, _: new_cache(model, method))
            found = list(logits(variant, ids, prefill=16, chunk=10))
        assert seen == expected
        assert [start for start, _ in found] == [sum(expected[:i]) for i in range(len(expected))]
    handle.remove()
    whole = variant.model(input_ids=ids).logits
    torch.testing.assert_close(torch.cat([piece for _, piece in found], 1), whole.detach(), rtol=1e-4, atol=1e-4)


def test_a_model_whose_first_tokens_see_each_other_is_measured_behind_them_only(variant, tokenizer):
    from smelt.attention._mixer import convert, place
    from smelt.attention.jrt import Jrt

    model = tiny("llama", hidden=128, heads=4, kv_heads=2, context=512)
    place(model, convert(model, Jrt(width=6, prefix=16)))
    reads = Variant("v", model, tokenizer, data=variant.data)
    with pytest.raises(SmeltError, match=r"'v' reads the first 16 tokens of a text both ways.*position\(first=16\)"):
        Perplexity(tokens=100)(reads)
    assert Position(documents=2, length=64, first=16)(reads)
