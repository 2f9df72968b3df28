"""The fixed pattern against loops over positions."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from smelt.attention._executor import counting
from smelt.attention.block_sparse import BlockSparse

MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=2, training=False)
METHODS = [BlockSparse(block=4, sinks=a, local=b, stride=c) for a, b, c in [(1, 1, 0), (0, 1, 3), (2, 3, 4), (0, 1, 0), (1, 2, 1)]]


def reads(method, i, j):
    query, key = i // method.block, j // method.block
    if j > i:
        return False
    return key < method.sinks or query - key <= method.local or (method.stride > 0 and key % method.stride == method.stride - 1)


def reference(method, query, key, value, scaling):
    """[b, t, h, d]; the queries are the last."""
    t, s = query.shape[2], key.shape[2]
    mask = torch.tensor([[reads(method, i, j) for j in range(s)] for i in range(s - t, s)])
    score = (query @ key.repeat_interleave(2, 1).mT * scaling).masked_fill(~mask, -torch.inf)
    return (score.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2)


def tensors(t, s, b=2):
    return torch.randn(b, 4, t, 8), torch.randn(b, 2, s, 8), torch.randn(b, 2, s, 8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("t", "s"), [(40, 40), (37, 37), (1, 37), (3, 35), (6, 39), (20, 37), (7, 7)])
def test_it_equals_the_loops_for_prompts_chunks_and_single_tokens(method, t, s):
    query, key, value = tensors(t, s)
    mask = None if t in (1, s) else torch.ones(1, 1, t, s, dtype=torch.bool).tril(s - t)
    out, _ = method(MODULE, query, key, value, mask, scaling=0.4)
    torch.testing.assert_close(out, reference(method, query, key, value, 0.4), atol=2e-6, rtol=1e-5)


def test_padding_moves_the_pattern_to_the_first_real_token():
    method = METHODS[1]
    for t in (37, 20, 1):
        query, key, value = tensors(t, 37)
        mask = torch.ones(2, 1, t, 37, dtype=torch.bool).tril(37 - t)
        mask[1, ..., :11] = False
        out, _ = method(MODULE, query, key, value, mask, scaling=0.4)
        first = max(0, 11 - (37 - t))
        alone = reference(method, query[1:, :, first:], key[1:, :, 11:], value[1:, :, 11:], 0.4)
        torch.testing.assert_close(out[1:, first:], alone, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(out[:1], reference(method, query[:1], key[:1], value[:1], 0.4), atol=2e-6, rtol=1e-5)


def test_any_other_mask_is_joined_with_the_pattern():
    """A sliding window, padded; and the empty places at the end of a static cache."""
    method, s = METHODS[1], 37
    query, key, value = tensors(s, s, b=1)
    at, keys = torch.arange(s)[:, None], torch.arange(s)
    window = (keys <= at) & (at - keys < 22) & (keys >= 3)
    out, _ = method(MODULE, query, key, value, window[None, None], scaling=0.4)
    start = s - 22  # the first key the last query sees; the pattern is counted from there
    mask = torch.tensor([[bool(window[i, j]) and reads(method, i - start, j - start) for j in range(s)] for i in range(s)])
    expected = functional.scaled_dot_product_attention(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask, scale=0.4)
    torch.testing.assert_close(out[:, 3:], expected.transpose(1, 2)[:, 3:], atol=2e-6, rtol=1e-5)
    room = [functional.pad(x, (0, 0, 0, 9), value=5.0) for x in (key, value)]
    for t in (1, 6):
        seen = torch.ones(1, 1, t, s + 9, dtype=torch.bool).tril(s - t)
        out, _ = method(MODULE, query[:, :, -t:], *room, seen, scaling=0.4)
        torch.testing.assert_close(out, reference(method, query[:, :, -t:], key, value, 0.4), atol=2e-6, rtol=1e-5)


def test_the_blocks_computed_are_those_of_the_pattern():
    method = METHODS[2]
    query, key, value = tensors(64, 64, b=1)
    with counting() as counts:
        method(MODULE, query, key, value, None, scaling=0.4)
    pairs = sum(reads(method, 4 * i, 4 * j) for i in range(16) for j in range(16))
    assert (counts.computed, counts.causal) == (4 * pairs, 4 * 16 * 17 // 2)


def test_a_new_token_copies_only_what_it_reads():
    """Keys that are not read may be anything, not-a-number included."""
    method = METHODS[1]
    query, key, value = tensors(1, 37)
    expected = reference(method, query, key, value, 0.4)
    unread = [j for j in range(37) if not reads(method, 36, j)]
    assert unread
    key[:, :, unread], value[:, :, unread] = torch.nan, torch.nan
    out, _ = method(MODULE, query, key, value, None, scaling=0.4)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=1e-5)
