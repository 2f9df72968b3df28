"""H2O against the greedy rule written with lists in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from helpers.cache import feed, positions, random_rows, see
from smelt.cache import _scored
from smelt.cache.h2o import H2O
from smelt.model._tiny import tiny
from smelt.runtime import cache_bytes, new_cache

HEADS, GROUP, WIDTH = 2, 2, 8
MODEL = tiny("llama", hidden=HEADS * GROUP * WIDTH, heads=HEADS * GROUP, kv_heads=HEADS)
CONFIG = MODEL.config
draw = partial(random_rows, HEADS, GROUP, WIDTH)


@pytest.mark.parametrize("slack", [0, 4])
@pytest.mark.parametrize("prompt", [1, 6, 25])
def test_what_stays_is_what_the_greedy_rule_keeps(prompt, slack):
    method, total = H2O(heavy=6, recent=5, slack=slack), 55
    query, key, value = draw(total)
    layer = method.layer(CONFIG, 0)
    sums = {(b, h): {} for b in range(2) for h in range(HEADS)}  # position held: what it drew so far
    for step, stop in enumerate(range(prompt, total + 1)):
        start = 0 if not step else stop - 1
        see(layer, query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop])
        for (b, h), drawn in sums.items():
            for i in range(start, stop):
                drawn[i] = 0.0
                for g in range(GROUP):
                    q = query[b, h * GROUP + g, i].double()
                    share = torch.stack([q @ key[b, h, p].double() for p in drawn]).mul(WIDTH**-0.5).softmax(0)
                    for p, s in zip(list(drawn), share.tolist(), strict=True):
                        drawn[p] += s / GROUP
            if len(drawn) > 11 + (slack if stop - start == 1 else 0):
                old = list(drawn)[:-5]
                for p in sorted(old, key=lambda p: drawn[p])[: len(old) - 6]:
                    del drawn[p]
        found = positions(layer, key).tolist()
        for (b, h), drawn in sums.items():
            assert found[b][h] == list(drawn), (stop, b, h)
            expected = torch.tensor(list(drawn.values()))
            torch.testing.assert_close(layer.scores.rows[b, h], expected, atol=1e-5, rtol=1e-5)


def test_a_heavy_hitter_stays_and_a_plain_window_would_lose_it():
    query, key, value = draw(120, batch=1)
    query[..., 0], key[..., 0] = 4.0, 0.0
    for h, place in enumerate((5, 11)):
        key[0, h, place, 0] = 4.0
    layer = H2O(heavy=4, recent=6, slack=2).layer(CONFIG, 0)
    feed(layer, (query, key, value), [20, *[1] * 100])
    assert 5 in positions(layer, key)[0, 0] and 11 in positions(layer, key)[0, 1]


def test_it_recovers_more_attention_than_as_many_recent_tokens():
    """Keys of lasting interest among others: the share of full attention that falls on what is held, mean over the steps."""
    query, key, value = draw(200)
    query[..., 0] += 2.0
    key[..., 0] += 2.0 * (torch.rand(2, HEADS, 200) < 0.1) * torch.rand(2, HEADS, 200) * 2
    layer = H2O(heavy=20, recent=10, slack=0).layer(CONFIG, 0)
    feed(layer, (query, key, value), [100])
    held, recent = [], []
    for t in range(100, 200):
        full = _scored.weights(query[:, :, t : t + 1], key[:, :, : t + 1], WIDTH**-0.5)[:, :, :, 0].mean(2)
        see(layer, *(part[:, :, t : t + 1] for part in (query, key, value)))
        held.append(full.gather(2, positions(layer, key)).sum(-1).mean())
        recent.append(full[:, :, -30:].sum(-1).mean())
    assert torch.stack(held).mean() > 1.1 * torch.stack(recent).mean()


def test_a_prompt_is_scored_in_pieces(monkeypatch):
    rows, most = draw(300, batch=1), []
    whole = H2O(heavy=20, recent=10).layer(CONFIG, 0)
    feed(whole, rows, [300])
    real = _scored.weights

    def watched(*given):
        found = real(*given)
        most.append(found.numel())
        return found

    monkeypatch.setattr(_scored, "weights", watched)
    monkeypatch.setattr(_scored, "AT_ONCE", 4 * 300 * 8)
    pieces = H2O(heavy=20, recent=10).layer(CONFIG, 0)
    feed(pieces, rows, [300])
    assert max(most) <= 4 * 300 * 8 < 4 * 300 * 300 and len(most) == 38
    assert torch.equal(pieces.key_rows.rows, whole.key_rows.rows)
    torch.testing.assert_close(pieces.scores.rows, whole.scores.rows, atol=1e-4, rtol=1e-5)


def test_the_bytes_are_those_of_the_budget():
    method = H2O(heavy=24, recent=8, slack=0)
    for prompt in (31, 32, 200):
        cache = new_cache(MODEL, method)
        for layer in cache.layers:
            feed(layer, draw(prompt + 5), [prompt, *[1] * 5])
        assert cache_bytes(cache) == method.bytes_held(CONFIG, prompt, 5, batch=2) == 2 * 2 * HEADS * 32 * (2 * WIDTH * 4 + 4)
