from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from smelt.compress import compress, save_compressed
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import linears
from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.awq import AWQ
from smelt.weights.gptq import GPTQ
from smelt.weights.planted_outliers import PlantedOutliers
from smelt.weights.rtn import RTN


def problem(columns=64, outliers=3, seed=0):
    """Two matrices and statistics of inputs some of which are large."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=draw, dtype=torch.float64)
    x[:, :outliers] *= 20
    weights = [torch.randn(out, columns, generator=draw) for out in (9, 17)]
    return weights, x.abs().mean(0).float(), x.mT @ x / len(x), x


def slow(weights, x, steps, grid):
    """Every power in turn, on the outputs themselves. Returns scales and errors."""
    found = []
    for step in range(steps):
        power = [x[:, j].abs().mean().item() ** (step / steps) for j in range(x.shape[1])]
        scale = torch.tensor([p / (max(power) * min(power)) ** 0.5 for p in power], dtype=torch.float64)
        error = 0.0
        for weight in weights:
            made = grid((weight * scale).float()).dequantize().double() / scale
            error += ((weight - made) @ x.mT).square().sum().item() / len(x)
        found.append((scale, error))
    return found


@pytest.mark.parametrize("grid", [RTN(bits=3, group=32), RTN(bits=4, group=-1, symmetric=True)])
def test_equals_the_loop(grid):
    weights, mean, hessian, x = problem()
    scale = AWQ(steps=10, quantizer=grid)(weights, mean, hessian)
    found = slow(weights, x, 10, grid)
    best = min(range(10), key=lambda at: found[at][1])
    assert best > 0
    assert_close(scale.double(), found[best][0], rtol=1e-4, atol=0)
    assert found[best][1] < 0.9 * found[0][1]


def test_matrices_that_read_one_input_are_weighed_together():
    """The second alone is best left as it is: all its error is where the outliers are not."""
    weights, mean, hessian, x = problem()
    weights = [10 * weights[0], weights[1].index_fill(1, torch.arange(3), 0.0)]
    grid = RTN(bits=3, group=-1)
    best = [min(range(10), key=lambda at: slow(part, x, 10, grid)[at][1]) for part in (weights, weights[1:])]
    assert best[0] != best[1]
    for group in (weights, weights[::-1]):
        assert_close(
            AWQ(steps=10, quantizer=grid)(group, mean, hessian).double(), slow(weights, x, 10, grid)[best[0]][0], rtol=1e-4, atol=0
        )


def test_one_power_is_the_quantizer_bit_for_bit(rows):
    made = [tiny("qwen2", layers=2, ffn=128) for _ in range(2)]
    for model, method in zip(made, (AWQ(steps=1, quantizer=RTN(group=32)), RTN(group=32)), strict=True):
        compress(model, None, method, rows, progress=None)
    for (name, a), (_, b) in zip(*(m.named_parameters() for m in made), strict=True):
        assert torch.equal(a, b), name


def test_silent_channels_and_silence_are_no_trouble():
    weights, mean, hessian, _ = problem()
    for silent in (torch.tensor([5]), torch.arange(64)):
        quiet = hessian.index_fill(0, silent, 0).index_fill(1, silent, 0)
        scale = AWQ(quantizer=RTN(group=32))(weights, mean.index_fill(0, silent, 0), quiet)
        assert torch.isfinite(scale).all() and (scale > 0).all()


def test_the_scale_is_where_it_should_be(rows):
    """q, k, v and gate, up carry the norm's share; down that of up's rows; o that of v's only where heads match."""
    for kv_heads, folded in ((4, True), (2, False)):
        model = tiny("llama", layers=1, ffn=128, kv_heads=kv_heads)
        before = {n: p.clone() for n, p in model.named_parameters()}
        method = AWQ(quantizer=RTN(bits=8, group=-1))
        model = PlantedOutliers()(model, [])
        compress(model, None, method, rows, progress=None)
        after = dict(model.named_parameters())
        for n in ("input_layernorm", "post_attention_layernorm"):
            assert not torch.equal(before[f"model.layers.0.{n}.weight"], after[f"model.layers.0.{n}.weight"])
        ratio = (after["model.layers.0.self_attn.o_proj.weight"] / before["model.layers.0.self_attn.o_proj.weight"]).median(0).values
        assert (ratio.std() > 0.01) == folded


def test_recovers_what_outliers_break(trained):
    """The notes' second row: planted outliers break round to nearest, and this undoes most of it."""
    model, rows, held = trained
    loss = {}
    for planted in (False, True):
        for method in (RTN(bits=3, group=-1), AWQ(quantizer=RTN(bits=3, group=-1))):
            made = PlantedOutliers()(model, []) if planted else copy.deepcopy(model)
            compress(made, None, method, rows, progress=None)
            with torch.no_grad():
                loss[type(method), planted] = sum(made(input_ids=b["input_ids"], labels=b["input_ids"]).loss.item() for b in held) / len(
                    held
                )
    broken = loss[RTN, True] - loss[RTN, False]
    assert broken > 0.02
    assert loss[AWQ, True] - loss[RTN, False] < 0.5 * broken


def test_gptq_after_it_sees_the_scaled_input(trained, monkeypatch):
    """Its Hessian is that of what the scaled matrix is multiplied with, so both corrections add up."""
    model, rows, _ = trained
    made = PlantedOutliers()(model, [])
    hessians, gains, plain = [], [], GPTQ.__call__

    def recorded(self, weight, hessian):
        hessians.append(hessian)
        return plain(self, weight, hessian)

    monkeypatch.setattr(GPTQ, "__call__", recorded)
    for method in (GPTQ(RTN(group=-1)), AWQ(quantizer=GPTQ(RTN(group=-1)))):
        copied = copy.deepcopy(made)
        compress(copied, None, method, rows, progress=None)
        gains.append(copied.model.layers[0].input_layernorm.weight)
    scale = (gains[0] / gains[1]).detach().double()
    assert scale.max() > 2 * scale.min()
    assert_close(hessians[21], hessians[0] / torch.outer(scale, scale), rtol=1e-5, atol=1e-9)


def test_saved_and_loaded_again(tmp_path, rows):
    ids = torch.arange(2, 26)[None]
    model = PlantedOutliers()(tiny("mistral", ffn=128), [])
    _, report = compress(model, None, AWQ(quantizer=RTN(bits=3, group=32)), rows, progress=None)
    assert len(report.codes) == 14
    save_compressed(model, tiny_tokenizer(), tmp_path, report)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(ids).logits, model(ids).logits)


def test_what_cannot_be_scaled_is_refused(rows):
    with pytest.raises(SmeltError, match=r"awq: quantizer is Wanda.*rtn\(\.\.\.\) or gptq"):
        parse("awq(quantizer=wanda())", "weights")
    model = tiny("bert")
    before = [m.weight.clone() for _, _, m in linears(model)]
    with pytest.raises(SmeltError, match="BertLayer: no mlp module"):
        compress(model, None, AWQ(quantizer=RTN(group=32)), rows, progress=None)
    assert all(torch.equal(w, m.weight) for w, (_, _, m) in zip(before, linears(model), strict=True))
