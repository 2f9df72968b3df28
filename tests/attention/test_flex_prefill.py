"""FlexPrefill: each step against loops, the patterns on constructed heads and on a trained model."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from smelt.attention._executor import expanded
from smelt.attention.flex_prefill import FlexPrefill, divergence, query_aware, tail, vertical_slash
from smelt.evaluate import Variant
from smelt.evaluate._text import prompt
from smelt.model._load import load
from smelt.runtime import bind

MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)


def tensors(n, b=2, scale=2.0):
    return scale * torch.randn(b, 4, n, 8), torch.randn(b, 2, n, 8), torch.randn(b, 2, n, 8)


def fewest(weights, share):
    total, count = 0.0, 0
    for weight in sorted(weights, reverse=True):
        if total >= share:
            break
        total, count = total + weight, count + 1
    return count


def slash_by_hand(weight, block, gamma, least):
    """weight [r, n] of the last rows -> the set of (query block, key block)."""
    rows, n = weight.shape
    m = -(-n // block)
    columns, diagonals = [0.0] * n, [0.0] * n
    for r in range(rows):
        for j in range(n - rows + r + 1):
            columns[j] += float(weight[r, j]) / rows
            diagonals[n - rows + r - j] += float(weight[r, j]) / rows

    def heaviest(weights):
        count = min(m, max(least, fewest(weights, gamma) // block + 1))
        pooled = [sum(weights[at * block : (at + 1) * block]) for at in range(m)]
        return set(sorted(range(m), key=lambda at: -pooled[at])[:count])

    across, along = heaviest(columns), heaviest(diagonals)
    return {(i, j) for i in range(m) for j in range(i + 1) if j in across or i - j in along or j == 0 or j == i}


def as_set(chosen):
    return {tuple(pair) for pair in chosen.nonzero().tolist()}


@pytest.mark.parametrize(("n", "block"), [(64, 8), (61, 8), (100, 4)])
@pytest.mark.parametrize(("gamma", "least"), [(0.2, 1), (0.7, 2), (0.99, 0)])
def test_vertical_slash_equals_the_loops(n, block, gamma, least):
    query, key, _ = tensors(n, scale=4.0)
    weight = tail(query, key, 0.5, block)
    exact = (query @ key.repeat_interleave(2, 1).mT * 0.5).masked_fill(~torch.ones(n, n).tril().bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(weight, exact[:, :, -block:], atol=1e-6, rtol=1e-5)
    chosen = vertical_slash(weight, block, gamma, least)
    for row in range(2):
        for h in range(4):
            assert as_set(chosen[row, h]) == slash_by_hand(weight[row, h], block, gamma, least)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_query_aware_keeps_the_fewest_pairs_over_all_rows(gamma):
    score, m = 2 * torch.randn(2, 4, 9, 9), 9
    chosen = query_aware(score, gamma)
    for row in range(2):
        for h in range(4):
            weight = {}
            for i in range(m):
                total = sum(math.exp(float(score[row, h, i, j])) for j in range(i + 1))
                weight |= {(i, j): math.exp(float(score[row, h, i, j])) / total for j in range(i + 1)}
            count = fewest(weight.values(), gamma * m)
            assert as_set(chosen[row, h]) == set(sorted(weight, key=lambda pair: -weight[pair])[:count])


def test_the_divergence_is_that_of_its_definition():
    p, q = torch.rand(5, 7).softmax(-1), torch.rand(5, 7).softmax(-1)
    p[0] = torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0])
    q[0] = torch.tensor([0.0, 0, 0.25, 0.75, 0, 0, 0])  # apart: the largest distance there is
    found = divergence(p, q)
    for row in range(1, 5):
        middle = [(a + b) / 2 for a, b in zip(p[row].tolist(), q[row].tolist())]
        halves = [sum(a * math.log(a / m) for a, m in zip(x[row].tolist(), middle)) for x in (p, q)]
        assert float(found[row]) == pytest.approx(math.sqrt(sum(halves) / 2), abs=1e-6)
    assert float(found[0]) == pytest.approx(math.sqrt(math.log(2)), abs=1e-6)
    assert not divergence(p, p).any()


@pytest.mark.parametrize("trusted", [0, 3, 8])
@pytest.mark.parametrize("n", [64, 61])
def test_it_is_sdpa_under_the_pattern_each_head_picks(trusted, n):
    """tau between the distances of the eight heads, so that as many as wanted are query-aware."""
    query, key, value = tensors(n)
    weight, keys = tail(query, key, 0.5, 8), key.repeat_interleave(2, 1)
    pooled_keys = torch.stack([keys[:, :, at : at + 8].mean(2) for at in range(0, n, 8)], 2)
    pooled_queries = torch.stack([query[:, :, at : at + 8].mean(2) for at in range(0, n, 8)], 2)
    blocks = torch.stack([weight.mean(2)[..., at : at + 8].sum(-1) for at in range(0, n, 8)], -1)
    estimate = (query[:, :, -8:].mean(2, keepdim=True) @ pooled_keys.mT * 0.5).softmax(-1)[:, :, 0]
    apart = divergence(blocks, estimate)
    tau = 0.0 if trusted == 0 else float(apart.flatten().sort().values[trusted - 1]) * (1 + 1e-4)
    method = FlexPrefill(block=8, gamma=0.5, tau=tau, min_budget=8)
    near = apart < tau
    aware = query_aware(pooled_queries @ pooled_keys.mT * 0.5, 0.5) | vertical_slash(weight, 8, 0.0, 1)
    chosen = torch.where(near[..., None, None], aware, vertical_slash(weight, 8, 0.5, 1))
    assert torch.equal(method.choose(query, key, 0.5), chosen)
    assert int(near.sum()) == trusted
    out, _ = method(MODULE, query, key, value, None, scaling=0.5)
    expected = functional.scaled_dot_product_attention(query, keys, value.repeat_interleave(2, 1), expanded(chosen, 8, n, n), scale=0.5)
    torch.testing.assert_close(out.transpose(1, 2), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("n", [64, 61])
def test_gamma_one_is_exact_and_reads_every_block(n):
    method = FlexPrefill(block=8, gamma=1.0)
    query, key, value = tensors(n)
    exact = functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), is_causal=True, scale=0.5
    )
    torch.testing.assert_close(method(MODULE, query, key, value, None, scaling=0.5)[0].transpose(1, 2), exact, atol=1e-6, rtol=1e-5)
    assert torch.equal(method.choose(query, key, 0.5), torch.ones(8, 8).tril().bool().expand(2, 4, 8, 8))


def test_decoding_chunks_and_two_blocks_or_fewer_are_bitwise_sdpa():
    method = FlexPrefill(block=8, gamma=0.1, min_budget=0)
    for t, s in ((1, 60), (20, 60), (16, 16), (9, 9)):
        query, key, value = tensors(s)
        mask = torch.ones(2, 1, t, s, dtype=torch.bool).tril(s - t) if 1 < t < s else None
        plain = sdpa_attention_forward(MODULE, query[:, :, -t:], key, value, mask, scaling=0.5)[0]
        assert torch.equal(method(MODULE, query[:, :, -t:], key, value, mask, scaling=0.5)[0], plain)


def test_the_diagonal_and_the_first_column_are_always_on():
    for gamma in (0.01, 0.5, 0.9):
        for tau in (0.0, 10.0):
            query, key, _ = tensors(128, scale=4.0)
            chosen = FlexPrefill(block=8, gamma=gamma, tau=tau, min_budget=0).choose(query, key, 0.5)
            assert chosen.diagonal(dim1=2, dim2=3).all() and chosen[..., 0].all()
            assert not chosen.triu(1).any()


def test_hot_columns_of_a_vertical_head_are_all_chosen():
    """Every query points where five keys point: gamma of the weight lies on them, wherever they are."""
    n, hot = 256, [3, 70, 71, 130, 200]
    query, key = torch.zeros(1, 4, n, 8), 0.1 * torch.randn(1, 2, n, 8)
    query[..., 0] = 6.0
    key[:, :, hot, 0] = 2.0
    method = FlexPrefill(block=8, gamma=0.9, tau=0.0, min_budget=32)
    chosen = method.choose(query, key, 1.0)
    for j in {at // 8 for at in hot}:
        assert chosen[:, :, j:, j].all()
    assert chosen.sum() < 0.6 * chosen.shape[1] * 32 * 33 / 2


@pytest.fixture(scope="module")
def layers():
    """(query, key, value, scaling) of every layer of the embedded model reading 1,024 tokens of code."""
    loaded, found = load("embedded", dtype=torch.float32), []
    ids = torch.tensor([prompt(Variant("plain", loaded.model, loaded.tokenizer), 1024)])
    kept = FlexPrefill.__call__

    def record(self, module, query, key, value, attention_mask, scaling, **kwargs):
        found.append((query, key, value, scaling))
        return kept(self, module, query, key, value, attention_mask, scaling, **kwargs)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(FlexPrefill, "__call__", record)
        with bind(loaded.model, attention=FlexPrefill(gamma=1.0)):
            loaded.model(ids, use_cache=False)
    return found


def test_on_text_the_density_falls_and_the_error_grows_with_gamma(layers):
    densities, errors = [], []
    for gamma in (1.0, 0.95, 0.9, 0.8):
        method = FlexPrefill(block=64, gamma=gamma, min_budget=64)
        density, error = [], []
        for q, k, v, c in layers:
            chosen = method.choose(q, k, c)
            density.append(chosen.sum((2, 3)) / (16 * 17 / 2))
            exact = functional.scaled_dot_product_attention(
                q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), is_causal=True, scale=c
            )
            error.append(float((method(MODULE, q, k, v, None, scaling=c)[0].transpose(1, 2) - exact).norm() / exact.norm()))
        densities.append(torch.cat(density))
        errors.append(sum(error) / len(error))
    print("density", [float(d.mean()) for d in densities], "error", errors)
    for more, less in itertools.pairwise(densities):
        assert (less <= more).all() and less.mean() < more.mean()
    assert errors[0] < 1e-6 and errors == sorted(errors)
