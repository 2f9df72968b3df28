from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smelt.compress import compress, save_compressed
from smelt.model._load import load
from smelt.model._swap import swapped
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks, fold, folds, linears
from smelt.spec import SmeltError
from smelt.weights._formats import packed_bytes
from smelt.weights.gptq import GPTQ
from smelt.weights.magnitude import Magnitude
from smelt.weights.rtn import RTN
from smelt.weights.spike_aware import SpikeAware, StaticInput, _spike

EIGHT = RTN(bits=8, group=0)
NAMES = ["model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj"]


def run(model, rows, **fields):
    return compress(copy.deepcopy(model), None, SpikeAware(**({"quantizer": EIGHT} | fields)), rows, progress=None)


def logits(model, rows):
    with torch.no_grad():
        return torch.cat([model(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in rows])


@pytest.fixture
def spiked():
    """A model whose o_proj of block 1 and down_proj of block 0 have spikes; its function is what it was."""
    model = tiny("llama", hidden=64, heads=4, kv_heads=4, ffn=96)
    for name, factor in zip(NAMES, (200.0, 50.0), strict=True):
        index, reader = int(name.split(".")[2]), model.get_submodule(name)
        found = next(f for f in folds(blocks(model)[index]) if reader in f.readers)
        scale = torch.ones(found.readers[0].in_features)
        scale[3] = 1 / factor
        fold(found, scale)
    return model


def test_the_ratio_is_of_the_largest_to_the_median():
    x = torch.tensor([[1.0, -2.0, 3.0], [-9.0, 0.5, 1.5]])
    assert _spike(x) == (9.0, 9.0 / sorted(abs(v) for v in x.flatten().tolist())[2])
    assert _spike(torch.zeros(4, 4)) == (0.0, 1.0)
    peak, ratio = _spike(torch.eye(4))  # mostly zeros: beyond any threshold, but a number
    assert peak == 1.0 and 1e30 < ratio < float("inf")


def test_spikes_planted_are_found_in_their_order_and_kept(spiked, rows):
    model, report = run(spiked, rows, keep=2)
    assert list(report["ratios"])[:2] == NAMES == report["kept"]
    before = {name: m.weight for _, name, m in linears(spiked)}
    for _, name, m in linears(model):
        assert torch.equal(m.weight, before[name]) == (name in NAMES)
    assert set(report.codes) == set(before) - set(NAMES)
    _, other = run(spiked, rows, keep=0, above=report["ratios"][NAMES[1]])
    assert sorted(other["kept"]) == sorted(NAMES), "above takes the ratio itself in"
    _, only = run(spiked, rows, keep=1, among="down_proj")
    assert only["kept"] == [NAMES[1]]


def test_ratios_are_those_of_the_inputs_without_padding(spiked, rows):
    _, report = run(spiked, rows, keep=1)
    seen = []
    hook = spiked.get_submodule(NAMES[1]).register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    logits(spiked, rows)
    hook.remove()
    real = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, rows, strict=True)]).abs().flatten()
    assert report["ratios"][NAMES[1]] == pytest.approx(float(real.max() / real.median()), rel=1e-4)
    every = [{"input_ids": b["input_ids"].clone(), "attention_mask": b["attention_mask"]} for b in rows]
    for b in every:
        b["input_ids"][b["attention_mask"] == 0] = 7  # other padding, the same ratios
    assert run(spiked, every, keep=1)[1]["ratios"] == pytest.approx(report["ratios"], rel=1e-4)


def test_keeping_the_spikes_recovers_what_rounding_per_tensor_loses(spiked, rows):
    dense = logits(spiked, rows)
    off = {}
    for label, fields in {"none": {"keep": 0}, "spikes": {"keep": 2}, "other": {"keep": 2, "among": "gate_proj"}}.items():
        made, _ = run(spiked, rows, activations=6, **fields)
        off[label] = float((logits(made, rows) - dense).norm())
    assert off["spikes"] < 0.4 * off["none"] and off["other"] > 0.8 * off["none"]
    wide, _ = run(spiked, rows, activations=8, keep=2)
    assert float((logits(wide, rows) - dense).norm()) < 0.5 * off["spikes"]


def test_keeping_all_is_the_dense_model(spiked, rows):
    for fields in ({"keep": 14}, SpikeAware.gentlest):
        with pytest.raises(SmeltError, match="changed nothing"):
            run(spiked, rows, activations=4, **fields)
    model = copy.deepcopy(spiked)
    with pytest.raises(SmeltError, match="changed nothing"):
        compress(model, None, SpikeAware(keep=14, quantizer=EIGHT), rows, progress=None)
    assert torch.equal(logits(model, rows), logits(spiked, rows))


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_inputs_are_rounded_to_the_grid_of_one_scale(bits):
    draw = torch.Generator().manual_seed(bits)
    weight, x = torch.randn(3, 4, generator=draw), 2 * torch.randn(5, 6, 4, generator=draw)
    most, scale = 2 ** (bits - 1) - 1, 0.3
    made = StaticInput(weight, bits, scale).product(x)
    for at in [(0, 0), (4, 5), (2, 3)]:
        q = [scale * min(max(round(v / scale), -most), most) for v in x[at].double().tolist()]
        want = [sum(float(w) * v for w, v in zip(row, q, strict=True)) for row in weight]
        assert_close(made[at].double(), torch.tensor(want, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_the_scale_is_the_largest_input_over_the_largest_code(spiked, rows):
    made, report = run(spiked, rows, activations=5, keep=0)
    seen = {}
    hooks = [m.register_forward_pre_hook(lambda m, x, name=name: seen.setdefault(name, []).append(x[0])) for _, name, m in linears(spiked)]
    logits(spiked, rows)
    for hook in hooks:
        hook.remove()
    keep = [b["attention_mask"].bool() for b in rows]
    for name, module in swapped(made):
        peak = max(float(x[k].abs().max()) for x, k in zip(seen[name], keep, strict=True))
        assert module.scale == pytest.approx(peak / 15, rel=1e-5) and module.bits == 5
    assert len(seen) == 14 and report["kept"] == []


def test_the_gradient_passes_the_rounding():
    module = StaticInput(torch.randn(3, 4), 3, 0.5)
    x = torch.randn(2, 4, requires_grad=True)
    module(x).sum().backward()
    assert_close(x.grad, module.weight.sum(0).expand(2, 4))
    with torch.no_grad():
        assert_close(module(x), module(x.clone().requires_grad_()).detach())


@pytest.mark.parametrize("activations", [0, 6])
def test_a_checkpoint_comes_back_as_it_was_measured(rows, tmp_path, activations):
    model = tiny("qwen2", hidden=64, ffn=96)  # its q, k, v have biases
    with torch.no_grad():
        for _, _, m in linears(model):
            if m.bias is not None:
                nn.init.normal_(m.bias)
    made, report = run(model, rows, activations=activations, keep=3)
    save_compressed(made, tiny_tokenizer(), tmp_path, report)
    assert report["stored"] == ("dense" if activations else "packed") and report["loads_in"] == ("smelt" if activations else "transformers")
    assert SpikeAware(activations=activations).quantizes == (not activations)
    back = load(tmp_path).model
    assert [name for name, _ in swapped(back)] == [name for name, _ in swapped(made)]
    assert sum(True for _ in swapped(back)) == (11 if activations else 0)
    assert torch.equal(logits(back, rows), logits(made, rows))


def test_bytes_of_what_is_kept_are_counted(spiked, rows):
    _, report = run(spiked, rows, keep=2)
    _, none = run(spiked, rows, keep=0)
    sizes = {name: m.weight.nbytes for _, name, m in linears(spiked)}
    assert report["extra_bytes"] == sum(sizes[name] - packed_bytes(none.codes[name]) for name in NAMES) > 0
    assert report["packed_bits_per_weight"] == report["bits_per_weight"], "packed, it is what is stored"
    assert report["bytes"] - none["bytes"] == pytest.approx(report["extra_bytes"], abs=1) and none["extra_bytes"] == 0
    _, static = run(spiked, rows, keep=2, activations=8)
    assert static["packed_bits_per_weight"] == report["packed_bits_per_weight"] and static["bits_per_weight"] == 32


def test_the_quantizer_may_measure_too(spiked, rows):
    _, report = run(spiked, rows, keep=2, quantizer=GPTQ(grid=RTN(bits=4, group=32)))
    assert len(report.codes) == 12 and {c.bits for c in report.codes.values()} == {4}


def test_what_cannot_be_is_refused(spiked, rows):
    for quantizer in (Magnitude(), SpikeAware(), None):
        with pytest.raises(SmeltError, match="quantizes each matrix"):
            SpikeAware(quantizer=quantizer)
    with pytest.raises(SmeltError, match="give one, the other 0"):
        SpikeAware(keep=2, above=10.0)
    with pytest.raises(SmeltError, match="activations=2"):
        SpikeAware(activations=1)
    with pytest.raises(SmeltError, match="the most is keep=14"):
        run(spiked, rows, keep=15)
    with pytest.raises(SmeltError, match="did you mean 'down_proj'"):
        run(spiked, rows, keep=1, among="down_prj")
