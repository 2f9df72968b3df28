"""The layer of narrow old rows: what its users share. What is narrow is tested with the methods."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from smelt.cache import _narrow
from smelt.cache._narrow import Coding, Narrow, NarrowLayer
from smelt.spec import SmeltError

D, HEADS, GROUP = 8, 2, 3


class Half(Narrow):
    """Keys: their first half. Values: doubled, and halved again when they are mixed."""

    key_width, value_width = D // 2, D

    def to(self, device): ...

    def table_bytes(self):
        return 0

    def choose(self, asked, key):
        raise AssertionError("nothing is chosen")

    def keys(self, key, start, chosen):
        return key[..., : D // 2]

    def values(self, value):
        return 2 * value

    def scores(self, query, rows, chosen):
        return query[..., : D // 2] @ rows.transpose(2, 3)

    def mixed(self, weights, rows):
        return weights @ rows / 2


def run(query, key, value, mask):
    key, value = key.repeat_interleave(GROUP, 1), value.repeat_interleave(GROUP, 1)
    causal = mask is None and query.shape[2] > 1
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=causal, scale=run.scaling).transpose(1, 2)


run.scaling = 0.3


def draw(tokens):
    shape = (2, HEADS, tokens, D)
    return torch.randn(2, HEADS * GROUP, tokens, D), torch.randn(shape), torch.randn(shape)


def call(layer, rows, start, stop):
    query, key, value = (part[:, :, start:stop] for part in rows)
    mask = (torch.arange(stop) <= torch.arange(start, stop)[:, None])[None, None] if start and stop - start > 1 else None
    return layer.update(key, value)[0].attend(query, mask, run)


@pytest.mark.parametrize("budget", [_narrow.BUDGET, 700])
@pytest.mark.parametrize("split", [lambda n: (n, n), lambda n: (n - n % 8, max(0, n - 8)), lambda n: (max(0, n - 5), 0)])
def test_old_rows_are_seen_narrow_and_new_ones_in_full(monkeypatch, budget, split):
    monkeypatch.setattr(_narrow, "BUDGET", budget)
    layer, rows = NarrowLayer(Half(), split), draw(60)
    assert torch.equal(call(layer, rows, 0, 21), run(*(part[:, :, :21] for part in rows), None))
    start = 21
    for size in (1, 1, 13, 1, 9, 1, 13):
        before = split(start)[0]
        out = call(layer, rows, start, start + size)
        query, key, value = (part[:, :, : start + size].clone() for part in rows)
        key[:, :, :before, D // 2 :] = 0
        mask = torch.arange(start + size) <= torch.arange(start, start + size)[:, None]
        torch.testing.assert_close(out, run(query[:, :, start:], key, value, mask), atol=1e-5, rtol=1e-5)
        start += size
        assert layer._old() == split(start) and layer.get_seq_length() == start


def test_crop_goes_back_through_narrow_rows_where_no_full_ones_are_missing():
    rows = draw(50)
    for split, back in ((lambda n: (n, n), 17), (lambda n: (max(0, n - 5), 0), 0)):
        layer, plain = NarrowLayer(Half(), split), NarrowLayer(Half(), split)
        call(layer, rows, 0, 40), call(plain, rows, 0, 40 - back)
        layer.crop(-back)
        for at in range(40 - back, 48):
            assert torch.equal(call(layer, rows, at, at + 1), call(plain, rows, at, at + 1))
    with pytest.raises(SmeltError, match=r"last 1 of 48 tokens cannot be taken back.*activate_past_recording"):
        layer.crop(-1)
    layer.activate_past_recording()
    call(layer, rows, 48, 50)
    layer.crop(-2)
    assert layer.get_seq_length() == 48


def test_values_have_the_largest_group_that_fits():
    for group in (4, 8, 32):
        for width in range(4, 132, 4):
            found = Coding(2, group).value_group(width)
            assert width % found == 0 and found % 4 == 0 and found <= group
            assert not any(width % size == 0 for size in range(found + 4, min(group, width) + 1, 4))
    with pytest.raises(SmeltError, match="values of 30 channels"):
        Coding(2, 32).value_group(30)
