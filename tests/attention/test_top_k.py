"""Top-k attention against loops over every query."""

from __future__ import annotations

import math

import pytest
import torch

from smelt.attention.top_k import TopK


def reference(query, key, value, mask, scaling, keep):
    """Each query by itself: its visible scores, sorted; softmax over those at least as large as the keep-th."""
    b, heads, t, _ = query.shape
    out, weights = torch.zeros(b, t, heads, value.shape[3]), torch.zeros(b, heads, t, key.shape[2])
    for row in range(b):
        for h in range(heads):
            g = h // (heads // key.shape[1])
            for i in range(t):
                seen = [j for j in range(key.shape[2]) if mask[row, 0, i, j] == 0]
                score = {j: scaling * float(query[row, h, i] @ key[row, g, j]) for j in seen}
                floor = sorted(score.values(), reverse=True)[:keep][-1]
                chosen = {j: s for j, s in score.items() if s >= floor}
                total = sum(math.exp(s - max(score.values())) for s in chosen.values())
                for j, s in chosen.items():
                    weights[row, h, i, j] = math.exp(s - max(score.values())) / total
                    out[row, i, h] += weights[row, h, i, j] * value[row, g, j]
    return out, weights


@pytest.mark.parametrize("keep", [1, 3, 7, 100])
@pytest.mark.parametrize(("t", "s"), [(7, 7), (1, 12), (4, 11)])
def test_it_equals_the_loops(keep, t, s):
    query, key, value = torch.randn(2, 4, t, 8), torch.randn(2, 2, s, 8), torch.randn(2, 2, s, 8)
    hidden = torch.arange(s)[None] > torch.arange(t)[:, None] + s - t
    mask = torch.where(hidden, torch.finfo(torch.float32).min, 0.0).expand(2, 1, t, s)
    out, weights = TopK(keep=keep)(None, query, key, value, mask, 8**-0.5)
    expected = reference(query, key, value, mask, 8**-0.5, keep)
    torch.testing.assert_close(out, expected[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(weights, expected[1], atol=1e-6, rtol=1e-4)
    assert weights.count_nonzero(-1).max() <= keep


def test_without_a_mask_every_key_is_seen():
    query, key, value = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    out, _ = TopK(keep=2)(None, query, key, value, None, 0.5)
    torch.testing.assert_close(out, reference(query, key, value, torch.zeros(1, 1, 3, 6), 0.5, 2)[0], atol=1e-5, rtol=1e-4)


def test_equal_scores_at_the_threshold_all_stay():
    query = torch.ones(1, 1, 1, 2)
    key = torch.tensor([3.0, 1.0, 1.0, 1.0, 0.0]).view(1, 1, 5, 1).expand(1, 1, 5, 2)
    _, weights = TopK(keep=2)(None, query, key, torch.randn(1, 1, 5, 2), None, 1.0)
    assert (weights[0, 0, 0] > 0).tolist() == [True, True, True, True, False]


def test_dropout_is_the_models():
    query = torch.randn(1, 1, 5, 4)
    dropped, kept = (TopK()(None, query, query, query, None, 1.0, dropout=p)[1] for p in (0.5, 0.0))
    assert (dropped == 0).any() and not (kept == 0).any()
