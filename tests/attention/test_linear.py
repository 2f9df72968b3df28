"""The helper smelt/attention/_linear.py against the double sum written out in float64."""

from __future__ import annotations

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from smelt import registry
from smelt.attention._linear import kept, linear, taylor, taylor_width, total
from smelt.attention._mixer import convert, place
from smelt.model._tiny import tiny
from smelt.model._walk import attention_of, blocks
from smelt.spec import SmeltError


def slow(query, key, value, decay, divide, real, sums):
    """o_i = e^(-s c(0, i)) q_i S + sum over real j <= i of e^(-s c(j, i)) (q_i k_j) v_j, c the real tokens behind j up to i."""
    (rows, heads, tokens, _), groups = query.shape, key.shape[1]
    value = torch.cat([value, torch.ones_like(value[..., :1])], -1) if divide else value
    out = torch.zeros(rows, heads, tokens, value.shape[-1]).double()
    left = torch.zeros(rows, groups, key.shape[-1], value.shape[-1]).double() if sums is None else sums.double().clone()
    start = left.clone()
    for b in range(rows):
        counts = [int(real[b, : i + 1].sum()) for i in range(tokens)]
        for h in range(heads):
            g = h * groups // heads
            s = float(decay[g])
            for i in range(tokens):
                out[b, h, i] = math.exp(-s * counts[i]) * (query[b, h, i] @ start[b, g])
                for j in range(i + 1):
                    if real[b, j]:
                        out[b, h, i] += math.exp(-s * (counts[i] - counts[j])) * (query[b, h, i] @ key[b, g, j]) * value[b, g, j]
        for g in range(groups):
            s = float(decay[g])
            left[b, g] *= math.exp(-s * counts[-1])
            for j in range(tokens):
                if real[b, j]:
                    left[b, g] += math.exp(-s * (counts[-1] - counts[j])) * torch.outer(key[b, g, j], value[b, g, j])
    if divide:
        out = torch.where(out[..., -1:] > 0, out[..., :-1] / out[..., -1:], 0.0)
    return out, left


def drawn(rows=2, heads=4, groups=2, tokens=13, width=3, size=2):
    query, key = torch.rand(rows, heads, tokens, width).double(), torch.rand(rows, groups, tokens, width).double()
    return query, key, torch.randn(rows, groups, tokens, size).double()


@pytest.mark.parametrize("chunk", [1, 3, 13, 128])
@pytest.mark.parametrize("divide", [True, False])
@pytest.mark.parametrize("decaying", [True, False])
@pytest.mark.parametrize("started", [True, False])
def test_chunks_equal_the_double_sum_whatever_is_padding(chunk, divide, decaying, started):
    query, key, value = drawn()
    decay = torch.tensor([0.3, 0.02]) if decaying else None
    real = torch.ones(2, 13, dtype=torch.bool)
    sums = torch.rand(2, 2, 3, 2 + divide).double() if started else None
    for case in ("none", "left", "holes"):
        if case == "left":
            real[1, :5] = False
        if case == "holes":
            real[0, 4:6], real[0, 11:] = False, False
        given = None if case == "none" else real
        out, left = linear(query, key, value, sums=sums, real=given, decay=decay, divide=divide, chunk=chunk)
        wanted, end = slow(query, key, value, torch.zeros(2) if decay is None else decay, divide, real, sums)
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(left, end, atol=1e-12, rtol=1e-10)


def test_the_sums_go_on_where_they_were_left():
    query, key, value = drawn(tokens=40)
    settings = {"decay": torch.tensor([0.3, 0.02]), "divide": True, "chunk": 8}
    whole, end = linear(query, key, value, **settings)
    sums, pieces = None, []
    for part in (slice(0, 11), slice(11, 12), slice(12, 40)):
        out, sums = linear(query[:, :, part], key[:, :, part], value[:, :, part], sums=sums, **settings)
        pieces.append(out)
    torch.testing.assert_close(torch.cat(pieces, 2), whole, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(sums, end, atol=1e-12, rtol=1e-10)


def test_quick_forgetting_overflows_nowhere_and_none_is_plain():
    query, key, value = (x.float() for x in drawn(tokens=300))
    decay = torch.tensor([8.0, 0.5])
    out, sums = linear(query, key, value, decay=decay)
    wanted, _ = slow(*(x[:1, :, :40].double() for x in (query, key, value)), decay, False, torch.ones(1, 40), None)
    assert torch.isfinite(out).all() and torch.isfinite(sums).all()
    torch.testing.assert_close(out[:1, :, :40].double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(linear(query, key, value, decay=torch.zeros(2))[0], linear(query, key, value)[0])


def test_sums_are_wide_where_the_model_is_not():
    query, key, value = (x.bfloat16() for x in drawn(tokens=600))
    out, sums = linear(query, key, value, divide=True)
    assert out.dtype == torch.bfloat16 and sums.dtype == torch.float32
    wanted, end = linear(query.double(), key.double(), value.double(), divide=True)
    torch.testing.assert_close(sums.double(), end, atol=1e-3, rtol=1e-5)  # bfloat16 sums would stop growing at 256
    torch.testing.assert_close(out.double(), wanted, atol=2**-8, rtol=2**-8)


def test_all_at_once_are_the_same_sums():
    query, key, value = drawn()
    real = torch.rand(2, 13) < 0.7
    torch.testing.assert_close(total(key, value, taylor, real), linear(query, key, value, real=real, divide=True, features=taylor)[1])


def test_gradients_are_those_of_finite_differences():
    query, key, value = (x.requires_grad_() for x in drawn(rows=1, heads=2, groups=1, tokens=5))
    sums = torch.rand(1, 1, taylor_width(3), 3).double().requires_grad_()
    decay = torch.tensor([0.1])

    def run(q, k, v, s):
        return linear(q, k, v, sums=s, divide=True, features=taylor, chunk=2, decay=decay)

    assert torch.autograd.gradcheck(run, (query, key, value, sums))


def test_taylor_features_give_the_second_order_kernel():
    for width in (1, 4, 16):
        query, key = 2 * torch.randn(2, 200, width)
        made = taylor(query)
        assert made.shape[-1] == taylor_width(width)
        s = (query @ key.T).double() / width**0.5
        kernel = made @ taylor(key).T
        torch.testing.assert_close(kernel.double(), 1 + s + s * s / 2, atol=2e-5, rtol=2e-5)
        assert kernel.min() > 0.49
    assert taylor_width(16) == 153


def test_what_has_no_such_maps_is_refused_by_name():
    with pytest.raises(SmeltError, match="based keeps linear maps v_proj, o_proj, and Phi3Attention has no such 'v_proj'"):
        kept(attention_of(blocks(tiny("phi3"))[0]), "based", "v_proj", "o_proj")


def test_the_benchmark_of_the_cost_of_a_token_runs(capsys):
    place = Path(__file__).parents[2] / "benchmarks" / "linear_cost.py"
    spec = importlib.util.spec_from_file_location("linear_cost", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(["--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    held = {(line.split()[0], line.split()[1]): int(line.split()[-1]) for line in lines}
    assert held["based", "64"] == held["based", "256"] == 4 * 153 * 65
    assert held["lightning", "64"] == held["lightning", "256"] == 4 * 2 * 64 * 64
    assert held["softmax", "256"] > 3 * held["softmax", "64"]


@torch.no_grad()
@pytest.mark.parametrize(("layers", "sizes"), [(None, (8, 32)), ((0,), (40, 0))], ids=["alone", "beside softmax"])
def test_a_mask_over_the_text_before_is_made_for_those_only_who_look_back(layers, sizes):
    """Row 1 is padded on the left; in pieces as in one call, also after the cache was copied."""
    model = tiny("mistral", layers=2)
    place(model, convert(model, registry.parse(f"based(layers={layers})", "attention")))
    ids, real = torch.randint(2, 300, (2, 40)), torch.ones(2, 40, dtype=torch.long)
    real[1, :7] = 0
    whole, cache, found = model(input_ids=ids, attention_mask=real).logits, DynamicCache(), []
    for start in range(0, 40, 8):
        now = {"input_ids": ids[:, start : start + 8], "attention_mask": real[:, : start + 8]}
        if start == 32:
            assert cache.layers[0].get_mask_sizes(8) == sizes
            cache = copy.deepcopy(cache)
        found.append(model(**now, past_key_values=cache, use_cache=True).logits)
    pieces = torch.cat(found, 1)
    torch.testing.assert_close(pieces[0], whole[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(pieces[1, 7:], whole[1, 7:], atol=1e-4, rtol=0)
