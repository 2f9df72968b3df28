"""Centroids in one dimension against loops."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from smelt.cache import _table
from smelt.cache._table import cost, fitted, normed, quantiles, sampled


def draw(n=3000):
    x = torch.randn(n).clamp(-1, 1) ** 3
    return x, torch.rand(n) ** 4 * (1 + 5 * (x > 0.2))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_every_centroid_is_the_weighted_mean_of_its_cell_and_no_iteration_makes_it_worse(monkeypatch, bits):
    x, weight = draw()
    costs = []
    for iterations in range(1, 12):
        monkeypatch.setattr(_table, "ITERATIONS", iterations)
        costs.append(cost(x, torch.ones_like(x), fitted(x, torch.ones_like(x), bits)))
    assert all(b <= a * (1 + 1e-12) for a, b in pairwise(costs))
    monkeypatch.setattr(_table, "ITERATIONS", 10_000)
    table = fitted(x, weight, bits)
    assert len(table) == 2**bits and (table.diff() > 0).all()
    for i, c in enumerate(table.tolist()):
        cell = [k for k, v in enumerate(x.tolist()) if min(range(2**bits), key=lambda j: abs(v - table[j])) == i] if bits == 2 else None
        if cell is not None:
            mean = (weight[cell].double() * x[cell].double()).sum() / weight[cell].double().sum()
            assert abs(mean - c) < 1e-9


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_under_the_weights_the_weighted_table_is_never_worse(bits):
    x, weight = draw()
    plain = fitted(x, torch.ones_like(x), bits)
    assert cost(x, weight, fitted(x, weight, bits)) < cost(x, weight, plain)
    assert torch.equal(fitted(x, torch.zeros_like(x), bits), plain)


def test_q_norm_keeps_mean_and_deviation():
    x, weight = draw()
    table = fitted(x, weight, 2)
    decoded = normed(x, table)[_table.nearest(x.double(), table)]
    torch.testing.assert_close(decoded.mean(), x.double().mean(), atol=1e-9, rtol=0)
    torch.testing.assert_close(decoded.std(), x.double().std(), atol=1e-9, rtol=0)
    assert torch.equal(normed(torch.full((5,), 0.5), table), table)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_share_beyond_the_quantiles_is_the_one_asked_for(share):
    x = torch.randn(2000, 6)
    low, high = quantiles(x, share)
    beyond = ((x < low) | (x > high)).float().mean(0)
    assert (low <= high).all() and ((beyond - share).abs() <= 0.001).all()


def test_places_are_spread_and_leave_out_first_tokens():
    for rows, tokens, first, batches in [(4, 64, 1, 2), (100, 900, 3, 5), (1, 4, 9, 1)]:
        places = sampled(rows, tokens, first, batches)
        assert 1 <= len(places) <= max(1, _table.TOKENS // batches) and places.max() < rows * tokens
        assert (places % tokens).min() >= min(first, tokens - 1)
    assert len(sampled(100, 900, 3, 5)) > _table.TOKENS // 5 * 0.9
