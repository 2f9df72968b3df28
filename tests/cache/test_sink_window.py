"""StreamingLLM against lists, and against dense attention of a whole model under its mask."""

from __future__ import annotations

import pytest
import torch

from smelt.cache.sink_window import SinkWindow
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes, new_cache


@pytest.fixture(scope="module")
def decoder():
    return tiny("llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)


@pytest.mark.parametrize(("sinks", "window"), [(0, 1), (0, 5), (4, 1), (4, 20), (3, 100)])
def test_survivors_are_the_first_and_the_last(sinks, window):
    method = SinkWindow(sinks=sinks, window=window)
    for n in (1, 3, 4, 5, 6, 23, 24, 25, 60):
        expected = [i for i in range(n) if i < sinks or i >= n - window]
        index = method.survivors(torch.zeros(2, 3, n, 4), torch.zeros(2, 3, n, 4))
        assert index.shape == (2, 3, method.kept(n)) == (2, 3, len(expected))
        assert (index == torch.tensor(expected)).all()


def test_token_by_token_equals_the_model_under_the_mask(decoder):
    sinks, window, tokens = 3, 9, 40
    ids = torch.randint(2, 320, (2, tokens))
    query, key = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    mask = (key <= query) & ((key < sinks) | (key >= query - window))
    with torch.no_grad():
        dense = decoder(ids, attention_mask=mask.expand(2, 1, -1, -1)).logits
        full = decoder(ids).logits
        cache = new_cache(decoder, SinkWindow(sinks=sinks, window=window))
        steps = [decoder(ids[:, t : t + 1], past_key_values=cache).logits for t in range(tokens)]
    torch.testing.assert_close(torch.cat(steps, 1), dense, atol=2e-5, rtol=1e-4)
    assert (dense - full).abs().max() > 0.1  # the mask does something


def test_a_prompt_is_attended_in_full_and_a_chunk_sees_what_was_kept_and_itself(decoder):
    method = SinkWindow(sinks=2, window=6)
    ids = torch.randint(2, 320, (1, 30))
    query, key = torch.arange(30)[:, None], torch.arange(30)[None]
    mask = (key <= query) & ((query < 20) | (key < 2) | (key >= 20 - 6))
    with torch.no_grad():
        dense = decoder(ids, attention_mask=mask[None, None]).logits
        cache = new_cache(decoder, method)
        prompt = decoder(ids[:, :20], past_key_values=cache).logits
        chunk = decoder(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([prompt, chunk], 1), dense, atol=2e-5, rtol=1e-4)


def test_memory_stops_growing(decoder):
    with bind(decoder, cache=SinkWindow(sinks=4, window=28)):
        held = [
            cache_bytes(decoder.generate(torch.randint(2, 320, (1, n)), max_new_tokens=20, return_dict_in_generate=True).past_key_values)
            for n in (20, 60, 150)
        ]
    assert held == [2 * 2 * 2 * 32 * 16 * 4] * 3


def test_sinks_are_what_a_plain_window_loses():
    """Keys of the first token that draw all attention: with them the output is that token's value, without them not."""
    key, value = torch.zeros(1, 1, 50, 4), torch.randn(1, 1, 50, 4)
    key[0, 0, 0] = 50.0
    query = torch.ones(1, 1, 1, 4)
    for sinks, kept in [(1, True), (0, False)]:
        layer = SinkWindow(sinks=sinks, window=10).layer(None, 0)
        for t in range(50):
            k, v = layer.update(key[:, :, t : t + 1], value[:, :, t : t + 1])
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v)
        assert torch.allclose(out, value[:, :, :1]) is kept
