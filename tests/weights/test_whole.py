from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch.testing import assert_close

import smelt.compress as module
from smelt.compress import compress
from smelt.journal import Journal
from smelt.model._tiny import tiny
from smelt.model._walk import linears
from smelt.spec import SmeltError
from smelt.weights._whole import Whole
from smelt.weights.rtn import RTN
from smelt.weights.wanda import Wanda


class Doing(Whole):
    """Does what a test wants done."""

    gentlest: ClassVar = {}

    def __init__(self, work):
        self.work = work

    def __call__(self, model, bench):
        return self.work(model, bench) or model

    @classmethod
    def example(cls):
        raise NotImplementedError


@pytest.fixture
def do(monkeypatch, rows):
    monkeypatch.setattr(module.registry, "check", lambda method: None)
    monkeypatch.setattr(module.registry, "name_of", lambda method: ("weights", "doing"))
    monkeypatch.setattr(module.registry, "text", lambda method: "doing()")

    def go(work, **options):
        return compress(tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1), None, Doing(work), rows, progress=None, **options)

    return go


def test_results_are_those_of_the_methods_on_the_model_as_it_was(do, rows):
    plain = tiny("llama", hidden=128, ffn=256, heads=2, kv_heads=1)
    seen = {}

    def work(model, bench):
        assert bench.rows is not rows and len(bench.rows) == len(rows) and bench.seed == 5
        seen.update(bench.results([Wanda(sparsity=0.5), Wanda(sparsity=0.25), RTN(bits=8)]))
        bench.put("model.layers.0.mlp.down_proj", seen["model.layers.0.mlp.down_proj"][0])
        bench.report["said"] = 1

    model, report = do(work, seed=5)
    weights = {name: m.weight for _, name, m in linears(plain)}
    assert list(seen) == list(weights)
    for name, (half, quarter, codes) in seen.items():
        assert (half == 0).sum() == weights[name].numel() // 2 and (quarter == 0).sum() == weights[name].numel() // 4
        assert torch.equal(codes.code, RTN(bits=8)(weights[name]).code)
    changed = [name for _, name, m in linears(model) if not torch.equal(m.weight, weights[name])]
    assert changed == ["model.layers.0.mlp.down_proj"] and report["said"] == 1 and report["kind"] == "whole"
    total = sum(w.numel() for w in weights.values())
    assert report["weights"] == total and report["sparsity"] == weights[changed[0]].numel() / 2 / total


def test_statistics_are_those_of_the_inputs(do, rows):
    got = {}

    def work(model, bench):
        for name, linear, given in bench.statistics(("input_rms", "inputs", "tokens")):
            got[name] = given
            assert given["inputs"].shape == (given["tokens"], linear.in_features)  # fewer than 4,096: all of them
            assert_close(given["inputs"].double().square().mean(0).sqrt(), given["input_rms"].double(), rtol=1e-5, atol=1e-6)
        bench.put("model.layers.1.mlp.up_proj", torch.zeros(256, 128))

    do(work)
    assert len(got) == 14 and all(g["tokens"] == int(sum(b["attention_mask"].sum() for b in rows)) for g in got.values())


def test_what_cannot_be_right_is_refused(do):
    with pytest.raises(SmeltError, match="changed nothing"):
        do(lambda model, bench: None)
    with pytest.raises(SmeltError, match="in its place already"):
        do(lambda model, bench: [bench.put("model.layers.1.mlp.up_proj", torch.zeros(256, 128)) for _ in range(2)] and None)
    with pytest.raises(SmeltError, match="not finite"):
        do(lambda model, bench: bench.put("model.layers.1.mlp.up_proj", torch.full((256, 128), torch.nan)))
    with pytest.raises(SmeltError, match="group=100 does not divide"):
        do(lambda model, bench: bench.results([RTN(group=100)]) and None)


def test_the_journal_outlives_the_call_only_with_a_folder(do, tmp_path):
    kept = []

    def work(model, bench):
        book = bench.journal("search")
        kept.append("one" in book)
        if "one" not in book:
            book.put("one", [1, 2])
        assert book["one"] == [1, 2]
        bench.put("model.layers.1.mlp.up_proj", torch.zeros(256, 128))

    for place in (None, None, tmp_path, tmp_path):
        do(work, place=place)
    assert kept == [False, False, False, True] and len(Journal(tmp_path / "search.jsonl")) == 1
