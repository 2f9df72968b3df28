"""Laws of every method that changes weights, whatever it is called."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json

import pytest
import torch
from torch.testing import assert_close

import smelt.compress as compress_module
from smelt import registry
from smelt.compress import compress, statistics_of
from smelt.journal import Journal
from smelt.model._swap import SwappedLinear, swapped
from smelt.model._tiny import tiny
from smelt.model._walk import linears
from smelt.weights import Codes, PerMatrix, Scaled
from smelt.weights._adapter import Adapter
from smelt.weights._merge import Merge
from smelt.weights._whole import Restructure, Whole

METHODS = [registry.load("weights", name) for name in registry.names("weights")]
MATRICES = [cls for cls in METHODS if issubclass(cls, PerMatrix)]
SHAPES = [cls for cls in METHODS if issubclass(cls, Restructure)]
SCALES = [cls for cls in METHODS if issubclass(cls, Scaled)]
WHOLES = [cls for cls in METHODS if issubclass(cls, Whole)]
OUT, IN = 24, 128


def given(method, dtype=torch.float32, seed=0):
    """A random weight with the statistics the method asks for, of one set of random inputs."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, IN, generator=draw).to(dtype) / IN**0.5
    x = torch.randn(4 * IN, IN, generator=draw, dtype=torch.float64) * torch.rand(IN, generator=draw, dtype=torch.float64)
    have = {
        "input_rms": x.square().mean(0).sqrt().to(dtype),
        "input_mean_abs": x.abs().mean(0).to(dtype),
        "hessian": x.mT @ x / len(x),
        "tokens": len(x),
        "inputs": x.to(dtype),
    }
    return weight, [have[name] for name in statistics_of(method)]


def dense(result, dtype):
    return result.dequantize().to(dtype) if isinstance(result, Codes) else result.dense() if isinstance(result, SwappedLinear) else result


def test_every_method_is_of_one_kind():
    merges = [cls for cls in METHODS if issubclass(cls, (Merge, Adapter))]  # their laws: tests/weights/test_merge.py, test_adapter.py
    assert METHODS and len(MATRICES) + len(SHAPES) + len(SCALES) + len(WHOLES) + len(merges) == len(METHODS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", MATRICES)
def test_same_shape_and_dtype_and_exact_budget(cls, dtype):
    method = cls()
    weight, statistics = given(method, dtype)
    before = weight.clone()
    result = method(weight, *statistics)
    assert torch.equal(weight, before), "the weight given is not changed in place"
    assert isinstance(result, Codes) == cls.quantizes and isinstance(result, SwappedLinear) == cls.swaps
    w = dense(result, dtype)
    assert w.shape == weight.shape and w.dtype == dtype and torch.isfinite(w).all()
    (budget,) = method.budget([(OUT, IN)])
    if isinstance(result, Codes):
        low, high = -(2 ** (result.bits - 1)), 2 ** (result.bits - 1) - 1
        assert result.code.dtype == torch.int8 and low <= result.code.min() and result.code.max() <= high
        stored = result.bits * IN * OUT + 16 * result.scale.numel() + (0 if result.zero is None else result.bits * result.zero.numel())
        assert budget.bits == stored / (IN * OUT)
    elif isinstance(result, SwappedLinear):
        assert isinstance(result, cls.module) and sum(t.numel() for t in result.state_dict().values()) == budget.numbers
        made = result(torch.eye(IN, dtype=dtype)).mT
        assert made.shape == (OUT, IN) and made.dtype == dtype
    else:
        assert budget.bits is None and int((w == 0).sum()) == budget.zeros


@pytest.mark.parametrize("cls", MATRICES)
def test_gentlest_setting_is_the_identity(cls):
    """Exactly where nothing is quantized; within 2^(1 - bits) of the norm where something is."""
    method = dataclasses.replace(cls(), **cls.gentlest)
    weight, statistics = given(method)
    result = method(weight, *statistics)
    if isinstance(result, Codes):
        assert (dense(result, weight.dtype) - weight).norm() < 2.0 ** (1 - result.bits) * weight.norm()
    elif isinstance(result, SwappedLinear):
        x = torch.randn(5, IN, generator=torch.Generator().manual_seed(3))
        torch.testing.assert_close(result(x), x @ weight.mT, rtol=1e-4, atol=1e-5)
    else:
        assert torch.equal(result, weight)


@pytest.mark.parametrize("cls", MATRICES)
def test_changes_something_by_default_and_is_deterministic(cls):
    method = cls()
    weight, statistics = given(method)
    first, second = (dense(method(weight.clone(), *statistics), weight.dtype) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, weight)


@pytest.mark.parametrize("cls", MATRICES)
def test_a_matrix_of_zeros_stays_zero(cls):
    method = cls()
    weight, statistics = given(method)
    assert not dense(method(torch.zeros_like(weight), *statistics), weight.dtype).any()


@pytest.mark.parametrize("cls", MATRICES)
def test_compress_meets_the_budget_on_a_model(cls, rows, tokenizer):
    method = cls()
    model = tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1)
    named = {name: module.weight.clone() for _, name, module in linears(model)}
    others = {n: p.clone() for n, p in model.named_parameters() if n.removesuffix(".weight") not in named}
    made, report = compress(model, tokenizer, method, rows, progress=None)
    assert report["matched"] == report["of"] == len(named) == 14
    assert all(torch.equal(dict(made.named_parameters())[n], p) for n, p in others.items()), "embeddings, norms and head are left alone"
    if cls.swaps:
        assert {n for n, _ in swapped(made)} == set(named)
        return
    budget = method.budget([tuple(w.shape) for w in named.values()])
    if cls.quantizes:
        assert set(report.codes) == set(named)
        assert all(b.bits <= report["bits_per_weight"] < b.bits + 0.1 for b in budget)  # whole words, and the shape
    else:
        assert not report.codes and report["sparsity"] * report["weights"] == pytest.approx(sum(b.zeros for b in budget))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("cls", SHAPES)
def test_restructure_keeping_everything_is_the_identity(cls, architecture, rows):
    method = dataclasses.replace(cls(), **cls.gentlest)
    model = tiny(architecture)
    ids, mask = rows[1]["input_ids"], rows[1]["attention_mask"]
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        made = method(copy.deepcopy(model), rows)
        assert_close(made(input_ids=ids, attention_mask=mask).logits, before, rtol=0, atol=0)
    assert type(made) is type(model) and made.num_parameters() == model.num_parameters()
    assert sum(p.numel() for p in type(model)(method.target(model.config)).parameters()) == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", SCALES)
def test_scales_are_positive_and_one_at_the_gentlest(cls, dtype):
    method = cls()
    weight, statistics = given(method, dtype)
    group = [weight, 2 * weight[:7]]
    before = [w.clone() for w in group]
    first, second = (method(group, *statistics) for _ in range(2))
    assert torch.equal(first, second) and first.shape == (IN,) and torch.isfinite(first).all() and (first > 0).all()
    assert all(torch.equal(w, b) for w, b in zip(group, before, strict=True)), "the weights given are not changed in place"
    gentle = dataclasses.replace(method, **cls.gentlest)
    assert torch.equal(gentle(group, *statistics), torch.ones(IN))
    assert (method([torch.zeros_like(weight)], *statistics) > 0).all()


@pytest.mark.parametrize("cls", SCALES)
def test_scaling_meets_the_budget_of_its_quantizer(cls, rows, tokenizer):
    method = cls()
    model = tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1)
    named = {name: module.weight.clone() for _, name, module in linears(model)}
    made, report = compress(model, tokenizer, method, rows, progress=None)
    assert made is model and report["matched"] == report["of"] == len(named) == 14 and set(report.codes) == set(named)
    budget = method.quantizer.budget([tuple(w.shape) for w in named.values()])
    assert all(b.bits <= report["bits_per_weight"] < b.bits + 0.1 for b in budget)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("cls", SCALES)
def test_scaling_moves_the_function_no_further_than_its_quantizer(cls, architecture, rows):
    """With eight bits next to nothing is left of the change, unless a scale was folded into the wrong place."""
    more = {"hidden": 128, "ffn": 128, "kv_heads": 4}
    method = dataclasses.replace(cls(), quantizer=cls.gentlest["quantizer"])
    ids, mask = rows[0]["input_ids"], rows[0]["attention_mask"]
    off = []
    for applied in (method, method.quantizer):
        model = tiny(architecture, **more)
        with torch.no_grad():
            before = model(input_ids=ids, attention_mask=mask).logits
            norms = [p.clone() for p in model.parameters() if p.dim() == 1]
            compress(model, None, applied, rows, progress=None)
            off.append((model(input_ids=ids, attention_mask=mask).logits - before).norm().item())
        changed = any(not torch.equal(a, b) for a, b in zip(norms, (p for p in model.parameters() if p.dim() == 1), strict=True))
        assert changed == (applied is method)
    assert off[0] < 2 * off[1]


def whole(cls, rows, place=None, seed=0):
    model = tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1)
    return compress(model, None, cls.example(), rows, progress=None, place=place, seed=seed)


@pytest.mark.parametrize("cls", WHOLES)
def test_a_whole_method_repeats_and_says_what_it_changed(cls, rows):
    (one, report), (two, _) = whole(cls, rows), whole(cls, rows)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    json.dumps(report)
    before = tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1)
    assert report["parameters_before"] == before.num_parameters()
    ids = rows[0]["input_ids"]
    assert torch.isfinite(one(input_ids=ids, attention_mask=rows[0]["attention_mask"]).logits).all()


@pytest.mark.parametrize("cls", WHOLES)
def test_a_whole_method_that_was_killed_ends_the_same(cls, rows, tmp_path, monkeypatch):
    """Killed after its third answer, and again after the next two: what it had put is not asked for again."""
    wanted, _ = whole(cls, rows)
    put, left = Journal.put, [3]

    def dying(self, key, value):
        put(self, key, value)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "put", dying)
    for lives in (3, 2):
        left[0] = lives
        try:
            whole(cls, rows, tmp_path)
        except KeyboardInterrupt:
            continue
    left[0] = -1
    made, _ = whole(cls, rows, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), wanted.state_dict().values(), strict=True))


@pytest.mark.parametrize("cls", [*MATRICES, *SCALES])
def test_a_calibration_that_was_killed_goes_on_at_its_layer(cls, rows, tmp_path, monkeypatch):
    def made(place):
        model = tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1, layers=3)
        return compress(model, None, cls(), rows, progress=None, place=place)

    (wanted, report), kept = made(None), compress_module.keep_block

    def dying(*args):
        kept(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(compress_module, "keep_block", dying)
    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt):
            made(tmp_path)
    monkeypatch.setattr(compress_module, "keep_block", kept)
    again, found = made(tmp_path)
    assert found == report and found.codes.keys() == report.codes.keys()
    assert all(torch.equal(c.code, report.codes[n].code) and torch.equal(c.scale, report.codes[n].scale) for n, c in found.codes.items())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), wanted.state_dict().values(), strict=True))
    last = cls().quantizer if cls in SCALES else cls()
    if statistics_of(cls()) or statistics_of(last):
        assert len(list(tmp_path.glob("block-*.safetensors"))) == 3
