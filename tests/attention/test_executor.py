"""The block executor against dense sdpa under the mask that its blocks spell out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from smelt.attention import _executor
from smelt.attention._executor import attend, by_padding, counting, expanded, is_causal, means, plain, prefill


def tensors(b, h, g, t, s, d=16, dtype=torch.float32):
    return torch.randn(b, h, t, d, dtype=dtype), torch.randn(b, g, s, d, dtype=dtype), torch.randn(b, g, s, d, dtype=dtype)


def blocks(b, h, t, s, block, share=0.4):
    n = -(-s // block)
    return torch.rand(b, h, n - (s - t) // block, n) < share


def reference(query, key, value, chosen, block, scaling):
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    mask = expanded(chosen, block, query.shape[2], key.shape[2])
    return functional.scaled_dot_product_attention(query, key, value, mask.expand(*query.shape[:3], -1), scale=scaling)


CASES = [(64, 64, 8), (61, 61, 8), (200, 200, 32), (19, 70, 8), (3, 70, 8), (1, 64, 8), (1, 65, 8), (33, 64, 16), (5, 5, 8)]


@pytest.mark.parametrize(("t", "s", "block"), CASES)
@pytest.mark.parametrize(("h", "g"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("alike", [(1, 1), (2, 1), (1, None), (2, None)])
def test_it_equals_dense_sdpa_under_the_expanded_mask(t, s, block, h, g, alike):
    query, key, value = tensors(2, h, g, t, s)
    chosen = blocks(alike[0], alike[1] or h, t, s, block)
    got = attend(query, key, value, chosen, block, 0.3)
    torch.testing.assert_close(got, reference(query, key, value, chosen, block, 0.3), atol=1e-6, rtol=1e-5)


def test_the_expanded_mask_says_what_loops_say():
    for t, s, block in CASES:
        n, first = -(-s // block), s - t
        chosen = blocks(1, 1, t, s, block)[0, 0]
        mask = expanded(chosen, block, t, s)
        for i in range(first, s):
            for j in range(s):
                read = j <= i and (i // block == j // block or bool(chosen[i // block - first // block, j // block]))
                assert bool(mask[i - first, j]) == read, (t, s, n, i, j)


def test_all_blocks_are_plain_causal_attention_and_gradients_are_those_of_dense_sdpa():
    query, key, value = (x.requires_grad_() for x in tensors(2, 4, 2, 53, 53, dtype=torch.float64))
    chosen = blocks(2, 4, 53, 53, 8)
    got = torch.autograd.grad(attend(query, key, value, chosen, 8, 0.3).square().sum(), (query, key, value))
    expected = torch.autograd.grad(reference(query, key, value, chosen, 8, 0.3).square().sum(), (query, key, value))
    for one, two in zip(got, expected):
        torch.testing.assert_close(one, two, atol=1e-10, rtol=1e-8)
    full = attend(query, key, value, torch.ones_like(chosen), 8, 0.3)
    torch.testing.assert_close(full, plain(query, key, value, 0.3), atol=1e-12, rtol=1e-10)


def test_pieces_of_a_group_change_nothing(monkeypatch):
    query, key, value = tensors(2, 4, 2, 64, 64)
    chosen = blocks(2, 4, 64, 64, 8)
    whole = attend(query, key, value, chosen, 8, 0.3)
    monkeypatch.setattr(_executor, "GATHERED", 1)
    torch.testing.assert_close(attend(query, key, value, chosen, 8, 0.3), whole, atol=1e-7, rtol=1e-6)


def test_a_row_or_head_does_not_depend_on_the_lists_of_another():
    query, key, value = tensors(2, 4, 2, 64, 64)
    one, two = blocks(2, 4, 64, 64, 8, 0.2), blocks(2, 4, 64, 64, 8, 0.8)
    two[0], two[1, :2] = one[0], one[1, :2]
    a, b = attend(query, key, value, one, 8, 0.3), attend(query, key, value, two, 8, 0.3)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1, :2], b[1, :2]) and not torch.equal(a[1, 2:], b[1, 2:])


def test_earlier_segments_are_read_from_elsewhere():
    """A block of its own segment comes from key and value, an earlier one from the other source: by a mask over both side by side."""
    query, key, value = tensors(2, 4, 2, 61, 61)
    old_key, old_value = torch.randn(2, 2, 4, 61, 16).unbind(0)
    chosen = blocks(2, 4, 61, 61, 8)
    got = attend(query, key, value, chosen, 8, 0.3, earlier=(old_key, old_value, 2))
    mask = expanded(chosen, 8, 61, 61)
    segment = torch.arange(61) // 16
    own = segment[:, None] == segment
    both = torch.cat([mask & own, mask & ~own], -1)
    key, value = (torch.cat([x.repeat_interleave(2, 1), old], 2) for x, old in ((key, old_key), (value, old_value)))
    expected = functional.scaled_dot_product_attention(query, key, value, both, scale=0.3)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("t", "s"), [(64, 64), (61, 61), (20, 61)])
def test_counted_is_what_was_computed(t, s):
    query, key, value = tensors(2, 4, 2, t, s)
    n, m = -(-s // 8), -(-s // 8) - (s - t) // 8
    causal = torch.ones(n, n).tril()[n - m :].bool()
    for heads in (1, 4):
        chosen = blocks(2, heads, t, s, 8)
        with counting() as outer, counting() as counts:
            attend(query, key, value, chosen, 8, 0.3)
            attend(query, key, value, chosen, 8, 0.3)
        kept = (chosen | torch.eye(n, dtype=torch.bool)[n - m :]) & causal
        assert counts.computed == 2 * int(kept.sum()) * (4 // heads)
        assert counts.causal == 2 * 8 * int(causal.sum())
        assert outer.computed == 0


def test_means_of_blocks_leave_the_filling_out():
    x = torch.randn(2, 3, 21, 5)
    expected = torch.stack([x[:, :, at : at + 8].mean(2) for at in (0, 8, 16)], 2)
    torch.testing.assert_close(means(x, 8), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("t", "s"), [(30, 30), (1, 30), (7, 30)])
def test_rows_are_run_without_their_padding_at_either_end(t, s):
    query, key, value = tensors(4, 4, 2, t, s)
    ends = [(0, s), (9, s), (0, s), (26, s)] if t < s else [(0, s), (9, s), (0, 17), (5, 20)]
    at, keys = torch.arange(s - t, s)[:, None], torch.arange(s)
    mask = torch.stack([(keys <= at) & (keys >= a) & (keys < b) for a, b in ends])[:, None]
    seen = []

    def run(q, k, v):
        seen.append((q.shape[0], k.shape[2]))
        return plain(q, k, v, 0.3)

    got = by_padding(run, query, key, value, mask)
    assert sorted(seen) == sorted([(ends.count(end), end[1] - end[0]) for end in set(ends)])
    expected = functional.scaled_dot_product_attention(
        query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1), mask | ~mask.any(-1, keepdim=True), scale=0.3
    )
    for row, (a, b) in enumerate(ends):
        real = slice(max(0, a - (s - t)), b - (s - t))
        torch.testing.assert_close(got[row, :, real], expected[row, :, real], atol=1e-6, rtol=1e-5)
        assert got[row].count_nonzero() == 4 * (real.stop - real.start) * 16


def test_other_masks_are_recognised():
    query, key, value = tensors(2, 4, 2, 30, 30)
    causal = torch.ones(2, 1, 30, 30, dtype=torch.bool).tril()
    run = lambda q, k, v: plain(q, k, v, 0.3)  # noqa: E731
    assert by_padding(run, query, key, value, causal) is not None
    for other in (
        causal & ~causal.tril(-8),
        causal.triu(0).flip(-1),
        causal & (torch.rand(30, 30) < 0.9),
        causal * 0 > 0,
        ~causal | causal,
    ):
        assert by_padding(run, query, key, value, other) is None
    assert by_padding(run, query, key, value, causal.float()) is None
    assert by_padding(run, query[:, :, :5], key, value, None) is None  # nobody said where the five stand


def test_prefill_leaves_all_but_whole_causal_prompts_to_sdpa():
    query, key, value = tensors(1, 4, 2, 40, 40)
    calls = []

    def run(q, k, v):
        calls.append(q.shape[2])
        return plain(q, k, v, 0.25)

    def call(t, s, block=8, mask=None, **more):
        module = SimpleNamespace(is_causal=True, num_key_value_groups=2)
        return prefill(run, block, module, query[:, :, :t], key[:, :, :s], value[:, :, :s], mask, 0.25, more)[0]

    dense = call(40, 40, block=20)
    assert not calls and dense.shape == (1, 40, 4, 16)
    torch.testing.assert_close(call(40, 40), dense, atol=1e-6, rtol=1e-5)
    assert calls == [40]
    call(1, 40), call(8, 40, mask=torch.ones(1, 1, 8, 40, dtype=torch.bool).tril(32)), call(40, 40, is_causal=False)
    assert calls == [40]


def test_whether_attention_is_causal_is_said_by_the_call_or_the_module():
    assert is_causal(None, {}) and not is_causal(SimpleNamespace(is_causal=False), {})
    assert is_causal(SimpleNamespace(is_causal=False), {"is_causal": True}) and is_causal(
        SimpleNamespace(is_causal=True), {"is_causal": None}
    )


def test_the_benchmark_runs(tmp_path):
    place = Path(__file__).parents[2] / "benchmarks" / "prefill_sparse.py"
    spec = importlib.util.spec_from_file_location("prefill_sparse", place)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    lines = json.loads((tmp_path / "found.json").read_text())["results"]
    assert len(lines) == 2 * (1 + len(benchmark.QUICK))
    for line in lines:
        assert line["computed"] == 0 if line["method"] == benchmark.NOTHING else 0 < line["computed"] < 1
        assert ("nats" in line) == (line["model"] == "embedded" and line["method"] != benchmark.NOTHING)
