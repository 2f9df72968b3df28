from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from smelt.compress import compress, save_compressed
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import linears
from smelt.spec import SmeltError
from smelt.weights.rtn import RTN

IDS = torch.arange(2, 50).view(2, 24)
# What plain transformers sees, in a process that never imports smelt: {folder: (logits, weights, greedy tokens)}.
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(torch.arange(2, 50).view(2, 24)).logits
    found[folder] = logits, model.state_dict(), model.generate(torch.arange(2, 9)[None], max_new_tokens=4, do_sample=False)
assert not [name for name in sys.modules if name.split(".")[0] == "smelt"]
torch.save(found, sys.argv[1])
"""


def slow(weight, bits, group, symmetric):
    """One weight at a time, in plain numbers."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    result = torch.zeros_like(weight)
    half = torch.bfloat16 if weight.dtype is torch.bfloat16 else torch.float16
    for o in range(len(weight)):
        for start in range(0, weight.shape[1], group):
            part = [w.item() for w in weight[o, start : start + group]]
            if symmetric:
                scale, zero = max(abs(w) for w in part) / high, 0
            else:
                scale = (max(0.0, *part) - min(0.0, *part)) / (high - low)
            scale = torch.tensor(scale).to(half).item()
            if not symmetric:
                zero = min(high, max(low, round(low - min(0.0, *part) / scale)))
            for i, w in enumerate(part):
                code = min(high, max(low, round(w / scale) + zero))
                result[o, start + i] = torch.tensor(code - zero).to(half) * torch.tensor(scale).to(half)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits, group", [(2, 8), (3, 16), (4, -1), (8, 0)])
def test_equals_the_loop(bits, group, symmetric, dtype):
    weight = (torch.randn(5, 32) + 0.5).to(dtype)
    codes = RTN(bits=bits, group=group, symmetric=symmetric)(weight)
    want = slow(weight, bits, group if group > 0 else 32, symmetric)
    off = codes.dequantize().to(dtype) != want
    assert off.float().mean() <= 0.02  # float32 division may round a tie the other way
    assert codes.code.shape == weight.shape and codes.scale.shape == (5, 32 // codes.group)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_error_is_at_most_half_a_step(bits, symmetric):
    weight = torch.randn(16, 64)
    codes = RTN(bits=bits, group=32, symmetric=symmetric)(weight)
    step = codes.scale.float().repeat_interleave(32, 1)
    # half a step, and at the ends of the range what rounding zero point and scale to their formats cost
    slack = 0.5 * (not symmetric) + 2**bits * 2.0**-11
    assert ((codes.dequantize().float() - weight).abs() <= (0.5 + slack) * step).all()


def test_more_bits_and_smaller_groups_are_closer():
    weight = torch.randn(32, 128)
    error = {k: (RTN(**dict(k))(weight).dequantize() - weight).norm().item() for k in [(("bits", b),) for b in range(2, 9)]}
    assert sorted(error.values(), reverse=True) == list(error.values())
    assert (RTN(group=32)(weight).dequantize() - weight).norm() < (RTN(group=128)(weight).dequantize() - weight).norm()


def test_extremes_need_no_special_care():
    for weight in (torch.zeros(2, 8), torch.full((2, 8), 1e-9), torch.full((2, 8), -3.0), torch.eye(8)):
        for symmetric in (True, False):
            w = RTN(bits=4, group=-1, symmetric=symmetric)(weight).dequantize().float()
            assert torch.isfinite(w).all() and (w - weight).abs().max() <= weight.abs().max() / 7 + 2.0**-24  # the smallest float16
    with pytest.raises(SmeltError, match=r"beyond torch\.float16"):
        RTN(bits=2, group=-1)(torch.full((2, 8), 1e6))


def test_group_must_divide_the_columns():
    with pytest.raises(SmeltError, match=r"group=128 does not divide the 192 columns.*nearest that fits is group=96"):
        RTN()(torch.randn(4, 192))
    with pytest.raises(SmeltError, match=r"group=128 does not divide the 192 .*nearest that fits is group=64$"):
        RTN().budget([(4, 192), (4, 640)])  # one that fits all


def test_outliers_break_it(model, plant):
    """The same function, but columns 20 times smaller share a grid with the others, and their error counts 20 times."""
    ids = torch.randint(2, 320, (2, 32))
    change = []
    for variant in (model, plant(model)):
        with torch.no_grad():
            before = variant(ids).logits
            compress(variant, None, RTN(bits=4, group=-1), [], progress=None)
            change.append((variant(ids).logits - before).norm().item())
    assert change[1] > 2 * change[0]


def cast(model, dtype):
    """model.to() would also round the rotary table, which is no weight and is not saved."""
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.config.dtype = dtype
    return model


def test_plain_transformers_loads_exactly_what_was_measured(tmp_path):
    made = {}
    for architecture, bits, group, symmetric, dtype in (
        ("llama", 4, 32, False, torch.float32),
        ("mistral", 3, -1, True, torch.float32),
        ("qwen2", 8, 16, False, torch.bfloat16),
        ("phi3", 5, -1, False, torch.float32),
    ):
        model = cast(tiny(architecture, ffn=90 if group < 0 else 96), dtype)
        model, report = compress(model, None, RTN(bits=bits, group=group, symmetric=symmetric), [], progress=None)
        made[str(tmp_path / architecture)] = model
        save_compressed(model, tiny_tokenizer(), tmp_path / architecture, report)
    done = subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path / "out.pt"), *made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, (logits, state, tokens) in torch.load(tmp_path / "out.pt").items():
        for name, value in made[folder].state_dict().items():
            assert torch.equal(state[name], value), (folder, name)
        with torch.no_grad():
            assert torch.equal(logits, made[folder](IDS).logits), folder
        assert tokens.shape[0] == 1 and 7 < tokens.shape[1] <= 11


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_width_reloads_exactly(bits, symmetric, tmp_path):
    model = tiny("llama", layers=1)
    model, report = compress(model, None, RTN(bits=bits, group=32, symmetric=symmetric), [], progress=None)
    save_compressed(model, tiny_tokenizer(), tmp_path, report)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("bits, symmetric", [(2, True), (4, False), (7, False)])
def test_the_file_is_as_small_as_the_formula(bits, symmetric, tmp_path):
    model = tiny("llama", hidden=128, ffn=384)
    shapes = [(module.out_features, module.in_features) for _, _, module in linears(model)]
    rest = 4 * (model.num_parameters() - sum(o * i for o, i in shapes))
    dense_bytes = 4 * model.num_parameters()
    model, report = compress(model, None, RTN(bits=bits, group=64, symmetric=symmetric), [], progress=None)
    save_compressed(model, tiny_tokenizer(), tmp_path, report)
    linear = sum(
        4 * o * -(-i * bits // 32) + 2 * o * (i // 64) + (0 if symmetric else 4 * -(-o * bits // 32) * (i // 64)) + 16 for o, i in shapes
    )
    assert report["bytes"] == linear
    file = (tmp_path / "model.safetensors").read_bytes()
    head = 8 + int.from_bytes(file[:8], "little")
    assert len(file) - head == linear + rest
    assert len(file) < 0.6 * dense_bytes
    about = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert about["config_groups"]["group_0"]["weights"]["num_bits"] == bits and about["ignore"] == ["lm_head"]
