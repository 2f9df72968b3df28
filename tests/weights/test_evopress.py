from __future__ import annotations

import copy
import itertools

import pytest
import torch

from smelt import registry
from smelt.compress import compress, save_compressed
from smelt.journal import Journal
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks, linears
from smelt.spec import SmeltError
from smelt.weights._levels import Divergence
from smelt.weights.evopress import EvoPress
from smelt.weights.magnitude import Magnitude
from smelt.weights.rtn import RTN
from smelt.weights.sparsegpt import SparseGPT
from smelt.weights.wanda import Wanda

SHARES = (0.4, 0.5, 0.6, 0.7, 0.8)
SHORT = {"rows": (4, 16), "survivors": (3, 1)}


def run(model, method, rows, **options):
    return compress(copy.deepcopy(model), None, method, rows, progress=None, **options)


@torch.no_grad()
def divergence(dense, made, rows, count=16):
    """KL(dense || made) in nats per token over the first rows, by another way than the search measures it."""
    total = tokens = 0.0
    for batch in rows:
        p, q = (m(**batch).logits.double().log_softmax(-1) for m in (dense, made))
        total += float((p.exp() * (p - q)).sum())
        tokens += batch["input_ids"].numel()
    assert sum(len(batch["input_ids"]) for batch in rows) == count
    return total / tokens


def zeros(model):
    return {name: int((module.weight == 0).sum()) for _, name, module in linears(model)}


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_the_search_beats_the_uniform_level_at_the_same_budget(trained, seed):
    """Notes, bench (d), smaller: KL on the calibration rows falls, and what is reported is what the model does."""
    model, rows, held = trained
    uniform, before = run(model, EvoPress(generations=0, **SHORT), rows, seed=seed)
    made, report = run(model, EvoPress(generations=10, offspring=6, **SHORT), rows, seed=seed)
    search, count = report["search"], sum(module.weight.numel() for _, _, module in linears(model))
    assert before["search"]["kl"] == search["kl_start"] > 1.05 * search["kl"]
    assert search["kl"] == pytest.approx(divergence(model, made, rows), rel=1e-4)
    assert search["kl_start"] == pytest.approx(divergence(model, uniform, rows), rel=1e-4)
    assert divergence(model, made, held, 32) < divergence(model, uniform, held, 32)
    assert search["counted"] == "values" and search["budget"] == sum(
        m.weight.numel() - round(0.6 * m.weight.numel()) for _, _, m in linears(model)
    )
    assert search["used"] == count - sum(zeros(made).values()) <= search["budget"] and search["used"] > 0.98 * search["budget"]
    for name, text in search["levels"].items():
        level = registry.parse(text, "weights")
        assert zeros(made)[name] == round(level.sparsity * model.get_submodule(name).weight.numel())
    assert len(set(search["levels"].values())) > 1 and len(set(zeros(uniform).values())) < len(search["levels"])


def test_the_levels_are_those_of_the_methods_on_the_dense_model(trained):
    """generations=0: the uniform level everywhere, whatever the order they are written in."""
    model, rows, _ = trained
    wanted, _ = run(model, Magnitude(sparsity=0.5), rows)
    levels = tuple(Magnitude(sparsity=share) for share in (0.7, 0.3, 0.5))
    for method in (EvoPress(levels=levels, generations=0, **SHORT), EvoPress(levels=levels, uniform=2, generations=0, **SHORT)):
        made, report = run(model, method, rows)
        assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), wanted.state_dict().values(), strict=True))
    _, report = run(model, EvoPress(levels=levels, uniform=0, generations=0, **SHORT), rows)
    assert set(report["search"]["levels"].values()) == {"magnitude(sparsity=0.7)"}


def test_random_search_takes_the_best_of_its_candidates(trained):
    model, rows, _ = trained
    settings = {"levels": (Magnitude(sparsity=0.4), Magnitude(sparsity=0.6), Magnitude(sparsity=0.8)), "rows": (16,), "survivors": (1,)}
    one, many = (run(model, EvoPress(generations=0, initial=n, **settings), rows)[1]["search"] for n in (1, 10))
    assert many["kl"] <= one["kl"] and many["used"] <= one["budget"] == many["budget"]


@pytest.mark.parametrize("unit, count", [("map", 14), ("part", 4), ("block", 2)])
def test_maps_of_one_unit_share_a_level(unit, count, rows):
    levels = (RTN(bits=2, group=32), RTN(bits=3, group=32), RTN(bits=8, group=32))
    method = EvoPress(levels=levels, unit=unit, generations=6, offspring=4, rows=(3, 6), survivors=(2, 1))
    _, report = run(tiny("llama"), method, rows)
    found = report["search"]["levels"]
    assert len(found) == count and report["search"]["counted"] == "bits" and report["search"]["used"] <= report["search"]["budget"]
    bits = {name: codes.bits for name, codes in report.codes.items()}
    for name, value in bits.items():
        layer, part = name.split(".")[2], "attention" if "self_attn" in name else "mlp"
        key = {"map": name, "part": f"model.layers.{layer}.{part}", "block": f"model.layers.{layer}"}[unit]
        assert registry.parse(found[key], "weights").bits == value
    assert report["search"]["used"] == sum(round(c.bits * c.code.numel() + c.scale.numel() * (16 + c.bits)) for c in report.codes.values())


def test_mixed_bit_widths_are_stored_dense_with_the_values_measured(rows, tmp_path):
    levels = (RTN(bits=2, group=32), RTN(bits=3, group=32), RTN(bits=8, group=32))
    method = EvoPress(levels=levels, generations=6, offspring=4, rows=(3, 6), survivors=(2, 1))
    model = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)  # a map that does next to nothing: its bits are better spent elsewhere
    made, report = run(model, method, rows)
    assert len({codes.bits for codes in report.codes.values()}) > 1
    save_compressed(made, tiny_tokenizer(), tmp_path, report)
    assert report["stored"] == "dense" and report["loads_in"] == "transformers"
    again = load(tmp_path).model
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), made.state_dict().values(), strict=True))


# ---------------------------------------------------------------------- depth


@torch.no_grad()
def without(model, gone, rows):
    """KL of the model with the attentions and mlps in `gone` ({(layer, "attention")}) skipped by hooks."""
    made, hooks = copy.deepcopy(model), []
    for at, block in enumerate(blocks(made)):
        if (at, "attention") in gone:
            hooks.append(block.self_attn.register_forward_hook(lambda module, inputs, out: (torch.zeros_like(out[0]), *out[1:])))
        if (at, "mlp") in gone:
            hooks.append(block.mlp.register_forward_hook(lambda module, inputs, out: torch.zeros_like(out)))
    return divergence(model, made, rows)


def test_dropping_whole_blocks_finds_the_best_and_leaves_a_smaller_model(trained):
    """All subsets tried by hand."""
    model, rows, _ = trained
    method = EvoPress(drop=1, unit="block", generations=6, offspring=3, rows=(16,), survivors=(1,))
    made, report = run(model, method, rows)
    each = [without(model, {(at, "attention"), (at, "mlp")}, rows) for at in range(3)]
    assert report["search"]["dropped"] == [f"model.layers.{each.index(min(each))}"]
    assert report["search"]["kl"] == pytest.approx(min(each), rel=1e-4) == pytest.approx(divergence(model, made, rows), rel=1e-4)
    assert made.config.num_hidden_layers == len(blocks(made)) == 2 and report["parameters_after"] < report["parameters_before"]


@pytest.mark.parametrize("drop", [1, 2])
def test_dropping_attentions_and_mlps_finds_the_best_in_the_budget(trained, drop):
    """All subsets tried by hand: attention 64 * (64 + 32 + 32 + 64), mlp 3 * 64 * 96 weights, so an mlp weighs more."""
    model, rows, _ = trained
    method = EvoPress(drop=drop, generations=25, offspring=6, rows=(16,), survivors=(1,))
    made, report = run(model, method, rows)
    size = {"attention": 64 * 192, "mlp": 3 * 64 * 96}
    parts, budget = list(itertools.product(range(3), size)), (3 - drop) * sum(size.values())
    best = {}
    for picked in itertools.chain.from_iterable(itertools.combinations(parts, n) for n in range(7)):
        if budget - min(size.values()) < sum(size[kind] for _, kind in parts) - sum(size[kind] for _, kind in picked) <= budget:
            best[picked] = without(model, set(picked), rows)
    gone = min(best, key=best.__getitem__)
    assert report["search"]["kl"] == pytest.approx(best[gone], rel=1e-4) == pytest.approx(divergence(model, made, rows), rel=1e-4)
    assert set(report["search"]["dropped"]) == {f"model.layers.{at}.{kind}" for at, kind in gone}
    whole = sum((at, "attention") in gone and (at, "mlp") in gone for at in range(3))
    assert len(blocks(made)) == 3 - whole
    assert sum(int(not p.any()) for _, _, m in linears(made) for p in [m.weight]) == len(gone) - 2 * whole


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2", "phi3"])
def test_a_dropped_part_is_zeros_that_add_nothing_biases_too(architecture, rows):
    more = {"attention_bias": True, "mlp_bias": True} if architecture == "llama" else {}
    model = tiny(architecture, layers=3, **more)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                p.normal_(generator=torch.Generator().manual_seed(0))
    method = EvoPress(drop=1, generations=3, offspring=4, rows=(3, 6), survivors=(2, 1))
    made, report = run(model, method, rows)
    with torch.no_grad():
        loss = Divergence(model, rows, (6,), "test")
        loss.model = made
        assert loss(0) == pytest.approx(report["search"]["kl"], rel=1e-4)
    assert report["search"]["dropped"] and report["search"]["used"] <= report["search"]["budget"]


# ---------------------------------------------------------------------- kills, errors, text


def test_a_killed_search_measures_no_generation_twice(trained, tmp_path, monkeypatch):
    model, rows, _ = trained
    method = EvoPress(levels=tuple(Magnitude(sparsity=share) for share in SHARES), generations=5, offspring=4, **SHORT)
    wanted, told = run(model, method, rows)
    put, calls, measure = Journal.put, [0], Divergence.__call__

    def counted(self, stage):
        calls[0] += 1
        return measure(self, stage)

    def dying(self, key, value):
        put(self, key, value)
        if key == "generation 3":
            raise KeyboardInterrupt

    monkeypatch.setattr(Divergence, "__call__", counted)
    monkeypatch.setattr(Journal, "put", dying)
    with pytest.raises(KeyboardInterrupt):
        run(model, method, rows, place=tmp_path)
    monkeypatch.setattr(Journal, "put", put)
    calls[0] = 0
    made, report = run(model, method, rows, place=tmp_path)
    assert calls[0] <= 2 * (4 + 3) and report["search"] == told["search"]
    assert all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), wanted.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"levels": (RTN(), 3)}, "levels holds 3"),
        ({"levels": (RTN(),)}, "it needs two levels"),
        ({"levels": (RTN(), RTN(bits=2)), "uniform": 2}, "uniform=2"),
        ({"drop": 1, "levels": (RTN(), RTN(bits=2))}, "give no levels with it"),
        ({"drop": 1, "unit": "map"}, "unit='part' or 'block'"),
        ({"rows": (4, 2)}, "must rise"),
        ({"rows": (4,)}, "one of each per stage"),
        ({"survivors": (3, 2)}, "fall to 1"),
        ({"rows": (), "survivors": ()}, "one of each per stage"),
    ],
)
def test_settings_that_contradict_each_other(settings, said):
    with pytest.raises(SmeltError, match=said):
        EvoPress(**settings)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({}, "calibration has 6, so set calibrate"),
        ({"levels": (Wanda(), SparseGPT()), "rows": (6,)}, "two that store the same"),
        ({"levels": (RTN(group=32), SparseGPT()), "rows": (6,)}, "bits and zeros"),
        ({"drop": 2, "rows": (6,)}, "drop=2 of 2 blocks would leave none"),
    ],
)
def test_what_cannot_be_searched_is_refused(settings, said, rows):
    settings = {"survivors": (1,), **settings} if settings else {}
    with pytest.raises(SmeltError, match=said):
        run(tiny("llama"), EvoPress(**settings), rows)


def test_it_is_written_as_it_reads():
    text = "evopress(levels=[gptq(grid=rtn(bits=2)), gptq(grid=rtn(bits=3))], uniform=1, rows=[2, 8, 32], survivors=[8, 2, 1])"
    method = registry.parse(text, "weights")
    assert method.levels[0].grid.bits == 2 and method.rows == (2, 8, 32)
    assert registry.parse(registry.text(method), "weights") == method
    assert registry.parse("evopress(drop=2, unit='block')", "weights") == EvoPress(drop=2, unit="block")
    assert hash(method) == hash(registry.parse(registry.text(method), "weights"))
