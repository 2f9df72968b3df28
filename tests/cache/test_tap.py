"""What a tap sees, against the model's own cache and loss."""

from __future__ import annotations

import pytest
import torch

from smelt.cache._tap import slopes, still, taps
from smelt.model._tiny import tiny


@pytest.fixture
def decoder():
    return tiny("llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)


def test_a_tap_sees_what_the_models_own_cache_holds(decoder):
    ids = torch.randint(2, 320, (2, 12))
    with torch.no_grad():
        plain = decoder(ids, use_cache=True)
        tapped = decoder(ids, past_key_values=(cache := taps(decoder)), use_cache=True)
    assert torch.equal(plain.logits, tapped.logits)
    for tap, layer in zip(cache.layers, plain.past_key_values.layers, strict=True):
        assert torch.equal(tap.keys, layer.keys) and torch.equal(tap.values, layer.values)


def test_slopes_are_those_of_the_loss_along_any_direction_and_the_model_is_left_as_it_was(decoder):
    ids = torch.randint(2, 320, (2, 10))
    decoder.train()
    for frozen in (False, True):
        decoder.requires_grad_(not frozen)
        with still(decoder):
            assert not decoder.training
            found = list(slopes(decoder, ids))
        assert decoder.training and all(p.grad is None for p in decoder.parameters())
    for index, layer in enumerate(found):
        for which in (0, 1):
            direction, size = torch.randn_like(layer[which]), torch.zeros((), requires_grad=True)

            def change(at, here=(index, which), direction=direction, size=size):
                return lambda *rows: tuple(r + size * direction if (at, w) == here else r for w, r in enumerate(rows))

            decoder.eval()
            loss = decoder(ids, past_key_values=taps(decoder, change), use_cache=True, labels=ids).loss
            loss.backward()
            torch.testing.assert_close((layer[2 + which] * direction).sum(), size.grad, atol=1e-6, rtol=1e-4)
            assert size.grad.abs() > 1e-5
