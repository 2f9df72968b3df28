"""Recycled Attention against dense attention under its mask, counted reads, and what it recovers on text."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers.cache import random_rows, run, see
from smelt.cache._scored import weights
from smelt.cache.recycled import Recycled
from smelt.model._tiny import tiny
from smelt.runtime import bind, cache_bytes, new_cache
from smelt.spec import SmeltError

HEADS, GROUP, WIDTH = 2, 3, 8
MODEL = tiny("llama", hidden=HEADS * GROUP * WIDTH, heads=HEADS * GROUP, kv_heads=HEADS)
CONFIG = MODEL.config
draw = partial(random_rows, HEADS, GROUP, WIDTH)


def part(rows, start, stop):
    return [x[:, :, start:stop] for x in rows]


@pytest.mark.parametrize("method", [Recycled(every=5, keep=6, share=0.0), Recycled(every=3, keep=2, share=0.3)], ids=repr)
def test_each_step_is_dense_attention_under_the_mask_of_its_set(method):
    prompt, total = 30, 70
    rows = draw(total)
    query, key, value = rows
    mask = torch.zeros(2, HEADS * GROUP, total, total, dtype=torch.bool)
    mask[:, :, :prompt] = torch.ones(total, total, dtype=torch.bool).tril()[:prompt]
    chosen: dict = {}
    for t in range(prompt, total):
        step = (t - prompt) % method.every
        for b in range(2):
            for h in range(HEADS):
                if step == 0:
                    mask[b, h * GROUP : (h + 1) * GROUP, t, : t + 1] = True
                    shares = []
                    for g in range(GROUP):
                        shares.append((key[b, h, : t + 1].double() @ query[b, h * GROUP + g, t].double() / WIDTH**0.5).softmax(0))
                    largest = torch.stack(shares).amax(0)
                    count = max(method.keep, -(-int(method.share * 100) * (t + 1) // 100))
                    chosen[b, h] = largest.topk(count).indices
                else:
                    mask[b, h * GROUP : (h + 1) * GROUP, t, chosen[b, h]] = True
                    mask[b, h * GROUP : (h + 1) * GROUP, t, t - step + 1 : t + 1] = True
    full = torch.ones(total, total, dtype=torch.bool).tril()
    dense, plain = run(query, key, value, mask), run(query, key, value, full)
    layer = method.layer(CONFIG, 0)
    outputs = [see(layer, *part(rows, 0, prompt)), *(see(layer, *part(rows, t, t + 1)) for t in range(prompt, total))]
    torch.testing.assert_close(torch.cat(outputs, 1), dense, atol=1e-6, rtol=1e-5)
    assert (dense - plain).abs().max() > 0.1  # the mask does something


def test_with_one_step_or_a_set_of_everything_it_is_full_attention():
    rows = draw(60)
    for method in (Recycled(every=1), Recycled(every=7, keep=1000), Recycled(every=7, keep=1, share=1.0), Recycled(keep=1, drift=1.0)):
        layer = method.layer(CONFIG, 0)
        outputs = [see(layer, *part(rows, 0, 20)), *(see(layer, *part(rows, t, t + 1)) for t in range(20, 60))]
        full = run(*rows, torch.ones(60, 60, dtype=torch.bool).tril())
        torch.testing.assert_close(torch.cat(outputs, 1), full, atol=1e-6, rtol=1e-5)


def test_the_rows_read_are_those_of_the_formula():
    method, read = Recycled(every=8, keep=16, share=0.0), []

    def counted(query, key, value, mask):
        read.append(key.shape[2])
        return run(query, key, value, mask)

    rows, layer = draw(240), method.layer(CONFIG, 0)
    see(layer, *part(rows, 0, 200), run=counted)
    read.clear()
    for t in range(200, 240):
        see(layer, *part(rows, t, t + 1), run=counted)
    assert read == [200 + i + 1 if i % 8 == 0 else 16 + i % 8 for i in range(40)]
    n, s, k = sum(range(201, 241, 8)) / 5, 8, 16
    assert sum(read) / 40 == pytest.approx(n / s + (1 - 1 / s) * (k + s / 2))


def test_a_planted_key_is_read_in_the_steps_between():
    query, key, value = draw(60, batch=1)
    query[:, :, 40:, 0] = 8.0
    key[..., 0] = 0.0
    key[0, 0, 7, 0] = key[0, 1, 23, 0] = 8.0
    layer = Recycled(every=10, keep=1, share=0.0).layer(CONFIG, 0)
    see(layer, *part((query, key, value), 0, 40))
    for t in range(40, 50):
        out = see(layer, *part((query, key, value), t, t + 1))
        assert len(layer.near_keys) == t - 39
        assert torch.equal(layer.near_keys.rows[0, :, 0], torch.stack([key[0, 0, 7], key[0, 1, 23]]))
        expected = torch.stack([value[0, 0, 7], value[0, 1, 23]]).repeat_interleave(GROUP, 0)
        torch.testing.assert_close(out[0, 0], expected, atol=1e-3, rtol=1e-3)


def test_a_block_reads_everything_and_the_next_step_is_full():
    rows, layer = draw(60), Recycled.example().layer(CONFIG, 0)
    full = run(*rows, torch.ones(60, 60, dtype=torch.bool).tril())
    see(layer, *part(rows, 0, 40))
    see(layer, *part(rows, 40, 41))
    assert len(layer.near_keys) == 8
    torch.testing.assert_close(see(layer, *part(rows, 41, 50)), full[:, 41:50], atol=1e-6, rtol=1e-5)
    assert not len(layer.near_keys)
    torch.testing.assert_close(see(layer, *part(rows, 50, 51)), full[:, 50:51], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("removed", [1, 2, 3])
def test_crop_behind_the_full_step_keeps_the_set_and_before_it_asks_again(removed):
    method = Recycled(every=20, keep=6, share=0.0)
    rows = draw(60)
    layer, plain = method.layer(CONFIG, 0), method.layer(CONFIG, 0)
    see(layer, *part(rows, 0, 40))
    see(plain, *part(rows, 0, 40))
    for t in range(40, 43):  # a full step and two recycled ones
        see(layer, *part(rows, t, t + 1))
    for t in range(40, 43 - removed):
        see(plain, *part(rows, t, t + 1))
    layer.crop(-removed)
    assert torch.equal(layer.key_rows.rows, plain.key_rows.rows) and len(layer.near_keys) == len(plain.near_keys)
    for t in range(50, 55):
        assert torch.equal(see(layer, *part(rows, t, t + 1)), see(plain, *part(rows, t, t + 1)))
    with pytest.raises(SmeltError, match="only"):
        layer.crop(-100)


def test_drift_asks_again_as_soon_as_the_query_turns():
    query, key, value = draw(60)
    query[:] = query[:, :, :1]
    query[1, :, 45:] = -query[1, :, 45:]  # one row of the batch turns round at 45
    layer = Recycled(every=100, keep=4, share=0.0, drift=0.5).layer(CONFIG, 0)
    see(layer, *part((query, key, value), 0, 40))
    full = []
    for t in range(40, 60):
        see(layer, *part((query, key, value), t, t + 1))
        full.append(layer.full_at == layer.seen)
    assert [i for i, was in enumerate(full) if was] == [0, 5]


def test_the_bytes_with_drift_are_the_most_that_is_held():
    method = Recycled(every=6, keep=5, share=0.1, drift=-0.05)
    cache, equal = new_cache(MODEL, method), 0
    for layer in cache.layers:
        see(layer, *draw(30))
    for written in range(1, 60):
        for layer in cache.layers:
            see(layer, *draw(1))
        most = method.bytes_held(CONFIG, 30, written, batch=2)
        assert cache_bytes(cache) <= most
        equal += cache_bytes(cache) == most
    assert equal


def test_greedy_text_of_a_set_of_everything_is_the_models():
    decoder = tiny("llama", eos_token_id=None, bos_token_id=None, pad_token_id=None)
    prompt = torch.randint(2, 320, (2, 40))
    plain = decoder.generate(prompt, max_new_tokens=25, do_sample=False)
    with bind(decoder, cache=Recycled(every=6, share=1.0)):
        assert torch.equal(decoder.generate(prompt, max_new_tokens=25, do_sample=False), plain)
    with bind(decoder, cache=Recycled(every=6, keep=1, share=0.0)):
        assert not torch.equal(decoder.generate(prompt, max_new_tokens=25, do_sample=False), plain)


def test_the_set_recovers_more_attention_than_as_many_recent_tokens():
    """Where queries ask for the same few of the old tokens: the share of full attention on what recycled steps read."""
    query, key, value = draw(240)
    query[..., 0] += 2.0
    key[..., 0] += 5.0 * (torch.rand(2, HEADS, 240) < 0.08)
    layer = Recycled(every=10, keep=24, share=0.0).layer(CONFIG, 0)
    see(layer, *part((query, key, value), 0, 200))
    read, recent = [], []
    for t in range(200, 240):
        see(layer, *part((query, key, value), t, t + 1))
        if layer.full_at == layer.seen:
            continue
        every = weights(query[:, :, t : t + 1], key[:, :, : t + 1], WIDTH**-0.5)[:, :, :, 0]
        held = (key[:, :, : t + 1, None] == layer.near_keys.rows[:, :, None]).all(-1).any(-1)  # [b, h, n]
        assert (held.sum(-1) == 24 + layer.seen - layer.full_at).all()
        read.append((every * held[:, :, None]).sum(-1).mean())
        recent.append(every[..., -(24 + layer.seen - layer.full_at) :].sum(-1).mean())
    assert len(read) == 36 and torch.stack(read).mean() > 1.5 * torch.stack(recent).mean()
