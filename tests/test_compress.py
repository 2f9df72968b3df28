from __future__ import annotations

import json
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch.testing import assert_close

import smelt.compress as module
from smelt.compress import calibration_rows, compress, save_compressed, statistics_of
from smelt.data._tokens import Tokens
from smelt.model._load import load
from smelt.model._tiny import ARCHITECTURES, tiny, tiny_tokenizer
from smelt.model._walk import blocks, linears
from smelt.spec import SmeltError
from smelt.weights import Budget, PerMatrix, Scaled
from smelt.weights.magnitude import Magnitude
from smelt.weights.minitron import Minitron
from smelt.weights.rtn import RTN


class Probe(PerMatrix):
    """Writes down what it was given, and changes each matrix a little."""

    gentlest: ClassVar = {}

    def __init__(self, factor=0.5):
        self.factor, self.seen = factor, []

    def __call__(self, weight, input_rms, input_mean_abs, hessian, tokens):
        self.seen.append((weight.clone(), input_rms, input_mean_abs, hessian, tokens))
        return weight * self.factor

    def budget(self, shapes):
        return [Budget() for _ in shapes]


@pytest.fixture
def probe(monkeypatch):
    """A method that is not registered."""
    monkeypatch.setattr(module.registry, "check", lambda method: None)
    monkeypatch.setattr(module.registry, "name_of", lambda method: ("weights", type(method).__name__.lower()))
    monkeypatch.setattr(module.registry, "text", lambda method: "probe()")
    return Probe()


@pytest.fixture
def rows():
    draw = torch.Generator().manual_seed(1)
    made = [{"input_ids": torch.randint(2, 320, (3, 12), generator=draw)} for _ in range(2)]
    for batch in made:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    made[0]["attention_mask"][1, 8:] = 0
    made[1]["attention_mask"][0, :5] = 0
    return made


def inputs_of(model, name, rows):
    """What reaches one linear map at the tokens that count, by whole forward passes."""
    found, batch = [], None
    target = dict(model.named_modules())[name]

    def hook(m, args):
        found.append(args[0][batch["attention_mask"].bool()])

    handle = target.register_forward_pre_hook(hook)
    with torch.no_grad():
        for batch in rows:
            model(**batch)
    handle.remove()
    return torch.cat(found).double()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_statistics_equal_whole_forward_passes(architecture, probe, rows):
    """Each layer is measured behind compressed layers: so compress one layer at a time and run the whole model."""
    more = {"sliding_window": 4} if architecture == "gemma2" else {}
    model, slow = (tiny(architecture, layers=3, **more) for _ in range(2))
    compress(model, None, probe, rows, progress=None)
    seen = iter(probe.seen)
    for index in range(3):
        named = [(name, m) for at, name, m in linears(slow) if at == index]
        measured = [inputs_of(slow, name, rows) for name, _ in named]
        for (name, linear), x in zip(named, measured, strict=True):
            weight, rms, mean_abs, hessian, tokens = next(seen)
            assert torch.equal(weight, linear.weight), name
            assert tokens == len(x) == sum(int(b["attention_mask"].sum()) for b in rows)
            assert hessian.dtype == torch.float64
            assert_close(hessian, sum(torch.outer(row, row) for row in x) / len(x), rtol=1e-4, atol=1e-5)
            assert_close(rms.double(), x.square().mean(0).sqrt(), rtol=1e-4, atol=1e-5)
            assert_close(mean_abs.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for _, linear in named:
                linear.weight.mul_(0.5)
    assert next(seen, None) is None
    for a, b in zip(model.parameters(), slow.parameters(), strict=True):
        assert torch.equal(a, b)


def test_padding_never_counts(probe, rows):
    changed = [dict(batch) for batch in rows]
    for batch in changed:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 5)
    second = Probe()
    for method, given in ((probe, rows), (second, changed)):
        compress(tiny("llama"), None, method, given, progress=None)
    for a, b in zip(probe.seen, second.seen, strict=True):
        assert_close(a[3], b[3], rtol=1e-5, atol=1e-7)


def test_maps_that_read_the_same_tensor_share_their_sums(probe, rows):
    compress(tiny("llama", layers=1), None, probe, rows, progress=None)
    q, k, v, o, gate, up, down = (entry[3] for entry in probe.seen)
    assert torch.equal(q, k) and torch.equal(q, v) and torch.equal(gate, up)
    assert not torch.equal(q, gate) and o.shape == (64, 64) and down.shape == (96, 96)


def test_batches_do_not_matter(probe, rows):
    second = Probe()
    single = [{k: v[i : i + 1] for k, v in batch.items()} for batch in rows for i in range(3)]
    for method, given in ((probe, rows), (second, single)):
        compress(tiny("mistral"), None, method, given, progress=None)
    for a, b in zip(probe.seen, second.seen, strict=True):
        assert_close(a[3], b[3], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_found_but_for_its_weights(probe, rows):
    model = tiny("llama")
    model.train()
    compress(model, None, probe, iter(rows), progress=None)
    assert model.training
    assert not any("forward" in vars(block) for block in blocks(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_report_counts(model, tokenizer):
    made, report = compress(model, tokenizer, Magnitude(0.25), [], progress=None)
    weights = sum(m.weight.numel() for _, _, m in linears(made))
    zeros = sum(int((m.weight == 0).sum()) for _, _, m in linears(made))
    assert report["method"] == "magnitude(sparsity=0.25)" and report["kind"] == "per_matrix"
    assert (report["matched"], report["of"], report["missed"]) == (14, 14, [])
    assert (report["weights"], report["sparsity"]) == (weights, zeros / weights) == (weights, 0.25)
    assert report["bits_per_weight"] == 32 and report["bytes"] == 4 * weights
    assert report["calibration_tokens"] is None
    assert json.loads(json.dumps(report)) == report, "ready for stage.json"


def test_relative_change_is_that_of_all_weights(probe, rows):
    _, report = compress(tiny("llama"), None, Probe(factor=0.75), rows, progress=None)
    assert report["relative_change"] == pytest.approx(0.25)
    assert report["calibration_tokens"] == sum(int(b["attention_mask"].sum()) for b in rows)


def test_targets_that_were_missed_are_named(model):
    model.model.layers[1].mlp.experts = torch.nn.Parameter(torch.randn(2, 4, 4))
    _, report = compress(model, None, Magnitude(), [], progress=None)
    assert (report["matched"], report["of"]) == (14, 15) and report["missed"] == ["1.mlp.experts"]


def test_no_targets_are_refused(model, monkeypatch):
    monkeypatch.setattr(module, "linears", lambda model: iter(()))
    with pytest.raises(SmeltError, match="no linear map inside the blocks"):
        compress(model, None, Magnitude(), [], progress=None)


def test_a_stage_that_changed_nothing_is_refused(model, rows):
    with pytest.raises(SmeltError, match=r"weights: magnitude changed nothing: all 14 matrices"):
        compress(model, None, Magnitude(sparsity=0.0), [], progress=None)
    for method in (Minitron(), Minitron(layers=2, hidden=64)):
        with pytest.raises(SmeltError, match="minitron changed nothing"):
            compress(model, None, method, rows, progress=None)


def test_rounding_that_loses_nothing_still_packs(model):
    """Codes make the file smaller even where every weight was on the grid already."""
    compress(model, None, RTN(bits=8, group=32), [], progress=None)
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    _, report = compress(model, None, RTN(bits=8, group=32), [], progress=None)
    assert_close(model.model.layers[0].mlp.up_proj.weight, before, rtol=0, atol=1e-2)
    assert len(report.codes) == 14 and report["bits_per_weight"] < 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_results_that_are_no_numbers_are_refused(probe, rows, value):
    with pytest.raises(SmeltError, match=r"'model\.layers\.0\.self_attn\.q_proj' came out"):
        compress(tiny("llama"), None, Probe(factor=value), rows, progress=None)


def test_results_of_another_shape_are_refused(probe, rows, monkeypatch):
    monkeypatch.setattr(Probe, "__call__", lambda self, weight, tokens: weight[:-1])
    with pytest.raises(SmeltError, match=r"came out with shape \(63, 64\)"):
        compress(tiny("llama"), None, probe, rows, progress=None)


def test_calibration_rows_are_asked_for(probe):
    padding = [{"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.zeros(1, 4, dtype=torch.long)}]
    for empty in ([], padding):
        with pytest.raises(SmeltError, match="needs calibration rows"):
            compress(tiny("llama"), None, probe, empty, progress=None)


def test_a_map_that_never_ran_is_refused(probe, rows):
    model = tiny("llama")
    model.model.layers[1].mlp.spare = torch.nn.Linear(64, 64)
    with pytest.raises(SmeltError, match=r"layers\.1\.mlp\.spare' was never called"):
        compress(model, None, probe, rows, progress=None)


def test_groups_are_checked_before_any_work(model):
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(SmeltError, match="group=64 does not divide the 96 columns some matrices have; the nearest that fits is group=32"):
        compress(model, None, RTN(group=64), [], progress=None)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)


class Doubled(Scaled):
    """Scales every input by a random number and hands its matrices to a probe."""

    gentlest: ClassVar = {}

    def __init__(self, made=None):
        self.quantizer, self.made, self.scales = Probe(factor=1 + 1e-6), made, []

    def __call__(self, weights, input_rms):
        scale = torch.rand(weights[0].shape[1], generator=torch.Generator().manual_seed(len(self.scales))) + 0.5
        self.scales.append((len(weights), input_rms, scale))
        return scale if self.made is None else self.made


def test_scaled_methods_see_the_input_and_their_quantizer_the_scaled_one(probe, rows):
    model, plain, method, probe.factor = tiny("llama", layers=1), tiny("llama", layers=1), Doubled(), 1 + 1e-6
    ids = torch.arange(2, 50).view(2, 24)
    with torch.no_grad():
        before = model(ids).logits
    for module_, made in ((model, method), (plain, probe)):
        compress(module_, None, made, rows, progress=None)
    with torch.no_grad():
        assert_close(model(ids).logits, before, rtol=1e-3, atol=1e-3)
    assert [count for count, _, _ in method.scales] == [3, 2, 1], "q, k, v; gate, up; down; o has no value head for each of its own"
    into, wide, down = (scale for _, _, scale in method.scales)
    scales = [into, into, into, torch.ones(64), wide, wide, down]
    for at, (scale, new, old) in enumerate(zip(scales, method.quantizer.seen, probe.seen, strict=True)):
        if at not in (2, 5):  # the rows of v and up are divided, too
            assert_close(new[0], old[0] * scale)
        assert_close(new[1], old[1] / scale, rtol=1e-5, atol=1e-7)
        assert_close(new[2], old[2] / scale, rtol=1e-5, atol=1e-7)
        assert_close(new[3], old[3] / torch.outer(scale, scale).double(), rtol=1e-5, atol=1e-9)
        assert new[4] == old[4]


@pytest.mark.parametrize("made", [torch.ones(63), torch.zeros(64), torch.full((64,), float("nan")), -torch.ones(64)])
def test_scales_that_are_none_are_refused(probe, rows, made):
    with pytest.raises(SmeltError, match=r"layers\.0\.self_attn\.q_proj' came out with scales that are not 64 positive numbers"):
        compress(tiny("llama"), None, Doubled(made), rows, progress=None)


def test_unknown_statistics_are_named():
    class Wants:
        def __call__(self, weight, hesian): ...

    with pytest.raises(SmeltError, match=r"asks for 'hesian'.*did you mean 'hessian'"):
        statistics_of(Wants())
    assert statistics_of(RTN()) == () and statistics_of(Probe()) == ("input_rms", "input_mean_abs", "hessian", "tokens")


def test_a_quantized_model_is_refused(model):
    model.config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(SmeltError, match="weights: rtn: the model is quantized already"):
        compress(model, None, RTN(), [], progress=None)


def test_settings_made_in_python_are_checked(model):
    with pytest.raises(SmeltError, match="bits is 1"):
        compress(model, None, RTN(bits=1), [], progress=None)


@pytest.mark.parametrize("method", [Magnitude(0.5), RTN(bits=4, group=32), Minitron(layers=1, hidden=48)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_saved_and_loaded_again(method, dtype, model, rows, tmp_path):
    made, report = compress(model, None, method, rows, progress=None)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        before = made(ids).logits
        save_compressed(made, tiny_tokenizer(), tmp_path, report, dtype)
        again = load(tmp_path).model
        assert torch.equal(made(ids).logits, before), "saving changes nothing in memory"
        if dtype is None:
            assert torch.equal(again(ids).logits, before)
    packed = set(report.codes)
    for (_, name, a), (_, _, b) in zip(linears(again), linears(made), strict=True):
        assert torch.equal(a.weight, b.weight if dtype is None or name in packed else b.weight.to(dtype).float()), name


def test_restructure_reports_both_shapes(model, rows):
    made, report = compress(model, None, Minitron(layers=1, ffn=48), rows, progress=None)
    assert (report["shape_before"]["ffn"], report["shape_after"]["ffn"]) == (96, 48)
    assert report["shape_after"]["layers"] == 1
    assert report["parameters_before"] == model.num_parameters() > report["parameters_after"] == made.num_parameters()
    assert json.loads(json.dumps(report)) == report


@pytest.fixture
def tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    np.arange(1000, dtype=np.uint16).tofile(folder / "ids.bin")
    np.array([0, 1000], np.int64).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 1000, "bytes": 1000, "documents": 1, "dtype": "uint16"}))
    return Tokens(folder)


def test_calibration_rows(tokens):
    made = calibration_rows(tokens, rows=7, context=32, batch=3, seed=5)
    assert [tuple(batch["input_ids"].shape) for batch in made] == [(3, 32), (3, 32), (1, 32)]
    ids = torch.cat([batch["input_ids"] for batch in made])
    assert (ids.diff(dim=1) == 1).all(), "every row is a window of the text"
    assert len({row[0].item() for row in ids}) == 7
    assert all(batch["attention_mask"].all() and batch["attention_mask"].shape == batch["input_ids"].shape for batch in made)
    again, other = (calibration_rows(tokens, rows=7, context=32, batch=3, seed=s) for s in (5, 6))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(made, again, strict=True))
    assert not torch.equal(made[0]["input_ids"], other[0]["input_ids"])
    with pytest.raises(SmeltError, match="rows=0"):
        calibration_rows(tokens, rows=0, context=32, batch=3, seed=5)
