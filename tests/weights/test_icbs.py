from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch

from smelt.compress import compress
from smelt.model._tiny import tiny
from smelt.model._walk import linears
from smelt.spec import SmeltError
from smelt.weights._surgeon import losses, stacked
from smelt.weights.awq import AWQ
from smelt.weights.icbs import ICBS, _Map, _visits
from smelt.weights.rtn import RTN
from smelt.weights.sparsegpt import SparseGPT
from smelt.weights.wanda import Wanda


def weights(model):
    return {name: module.weight.data for _, name, module in linears(model)}


def run(model, rows, seed=0, **fields):
    return compress(copy.deepcopy(model), None, ICBS(**fields), rows, progress=None, seed=seed)


def a_map(out=8, columns=10, pruned=40, movable=None):
    kept = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    off = torch.zeros(out * columns, dtype=torch.bool)
    off[:pruned] = True
    may = torch.ones_like(off) if movable is None else movable
    linear = SimpleNamespace(weight=SimpleNamespace(data=kept.masked_fill(off.view_as(kept), 0.0)))
    return _Map(linear, kept, kept, off, may, torch.zeros(off.shape, dtype=torch.int32))


@pytest.mark.parametrize("initial", [Wanda(sparsity=0.7), SparseGPT(sparsity=0.6)])
@pytest.mark.parametrize("solver, block", [("swap", 64), ("exhaustive", 10)])
def test_zeros_of_every_map_and_values_of_kept_weights_are_conserved(trained, initial, solver, block):
    model, rows, _ = trained
    start, _ = run(model, rows, initial=initial, blocks=0)
    made, report = run(model, rows, initial=initial, blocks=30, block=block, solver=solver, samples=8)
    first, after, plain = weights(start), weights(made), weights(model)
    assert report["icbs"]["moved"] > 0 and report["kind"] == "whole"
    moved = 0
    for name, w in after.items():
        assert int((w == 0).sum()) == int((first[name] == 0).sum())
        came, went = (first[name] == 0) & (w != 0), (first[name] != 0) & (w == 0)
        moved += int(came.sum())
        assert int(came.sum()) == int(went.sum())
        assert torch.equal(w[came], plain[name][came]), "a weight that comes back has the value it had"
        stayed = (first[name] != 0) & (w != 0)
        assert torch.equal(w[stayed], first[name][stayed]), "and one that stays is as the first method left it"
    assert 0 < moved <= report["icbs"]["moved"]


def test_no_blocks_is_the_initial_mask(trained):
    model, rows, _ = trained
    made, report = run(model, rows, initial=Wanda(sparsity=0.5), blocks=0)
    first = next(iter(weights(model)))  # of the first map the inputs are the same in a pass over pruned layers
    wanda, _ = compress(copy.deepcopy(model), None, Wanda(sparsity=0.5), rows, progress=None)
    assert torch.equal(weights(made)[first], weights(wanda)[first])
    assert report["icbs"] == {"moved": 0, "expected": 0, "measured": 0, "blocks": []}


def test_the_search_lowers_the_loss_on_its_rows_and_more_blocks_lower_it_further(trained):
    model, rows, _ = trained
    ids, mask = stacked(rows, torch.device("cpu"))
    with torch.no_grad():
        found = [float(losses(run(model, rows, blocks=n)[0], ids, mask).mean()) for n in (0, 15, 40)]
    assert found[2] < found[1] < found[0] - 0.01


def test_measured_is_the_true_change_of_the_loss_and_expected_has_its_sign(trained):
    """With all rows in every block the changes add up to the whole."""
    model, rows, _ = trained
    ids, mask = stacked(rows, torch.device("cpu"))
    settings = {"blocks": 21, "samples": len(ids), "block": 32}
    made, report = run(model, rows, **settings)
    start, _ = run(model, rows, blocks=0)
    with torch.no_grad():
        change = float(losses(made, ids, mask).double().mean() - losses(start, ids, mask).double().mean())
    log = report["icbs"]
    assert log["measured"] == pytest.approx(change, abs=1e-5) and change < 0
    assert log["measured"] == pytest.approx(sum(each["measured"] for each in log["blocks"]))
    assert log["expected"] < 0 and 1 / 3 < log["measured"] / log["expected"] < 3
    assert {each["map"] for each in log["blocks"]} == set(weights(model))  # 21 maps, each once
    json.dumps(report)


def test_the_seed_decides(trained):
    model, rows, _ = trained
    one, two, other = (weights(run(model, rows, seed=seed, blocks=8)[0]) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_a_block_is_the_best_of_the_pruned_and_the_worst_of_the_kept_that_may_move():
    movable = torch.ones(80, dtype=torch.bool)
    movable[[39, 40]] = False  # the best pruned and the worst kept weight
    found = a_map(movable=movable)
    score = torch.arange(80.0)
    assert found.block(score, 6, 0.0).tolist() == [36, 37, 38, 41, 42, 43]
    assert found.block(score, 5, 0.0).tolist() == [37, 38, 41, 42]
    assert len(found.block(score, 1000, 0.0)) == 78


def test_visited_weights_rest_until_so_many_blocks_have_passed():
    found, score, seen = a_map(), torch.arange(80.0), []
    for _ in range(6):
        block = found.block(score, 8, 0.3)  # 40 of a side, 4 a visit: 0.3 * 40 / 4 = 3 visits are remembered
        seen.append(set(block.tolist()))
        found.move(block.tolist(), [])
    assert not (seen[0] & seen[1]) and not (seen[0] & seen[2]) and not (seen[0] & seen[3])
    assert seen[4] == seen[0] and seen[5] == seen[1]


def test_a_flip_prunes_the_one_and_brings_the_other_back():
    found = a_map()
    found.flip([0, 79])
    w = found.linear.weight.data.flatten()
    assert w[0] == found.kept.flatten()[0] and w[79] == 0 and not found.pruned[0] and found.pruned[79]
    assert torch.equal(found.made().flatten(), w)
    found.flip([0, 79])
    assert torch.equal(found.linear.weight.data, found.kept.masked_fill(found.pruned.view(8, 10), 0.0)) and found.pruned[0]


def test_every_map_is_visited_where_blocks_suffice_and_large_ones_more_often():
    sizes = [10, 10, 10**6]
    assert sorted(_visits(sizes, 3, 0)) == [0, 1, 2] and _visits(sizes, 0, 0) == [] and len(_visits(sizes, 2, 0)) == 2
    many = torch.tensor(_visits(sizes, 9003, 1)).bincount() - 1
    share = torch.tensor(sizes).double().log1p() / torch.tensor(sizes).double().log1p().sum()
    assert ((many / 9000 - share).abs() < 0.02).all()


def test_weights_that_are_zero_anyway_stay_out_of_it(rows):
    model = tiny("llama")
    with torch.no_grad():
        for _, _, module in linears(model):
            module.weight[:, ::3] = 0.0
    before = {name: int((w == 0).sum()) for name, w in weights(run(model, rows, blocks=0)[0]).items()}
    made, _ = run(model, rows, blocks=28, block=16, samples=6)
    assert {name: int((w == 0).sum()) for name, w in weights(made).items()} == before
    assert all(not w[:, ::3].any() for w in weights(made).values())


def test_what_cannot_be_is_refused(rows):
    for initial in (RTN(), AWQ(), 3):
        with pytest.raises(SmeltError, match="prunes each matrix"):
            ICBS(initial=initial)
    with pytest.raises(SmeltError, match="breaks the pattern"):
        ICBS(initial=Wanda(n=2, m=4))
    with pytest.raises(SmeltError, match="block=20"):
        ICBS(solver="exhaustive")
    with pytest.raises(SmeltError, match="changed nothing"):
        run(tiny("llama"), rows, **ICBS.gentlest)


def test_an_error_in_the_search_leaves_the_weights_as_they_were(rows, monkeypatch):
    def broken(*_):
        raise RuntimeError("broken")

    model = tiny("llama")
    before = {name: w.clone() for name, w in weights(model).items()}
    monkeypatch.setattr("smelt.weights.icbs.traced", broken)
    with pytest.raises(RuntimeError, match="broken"):
        compress(model, None, ICBS(blocks=1), rows, progress=None)
    assert all(torch.equal(w, before[name]) for name, w in weights(model).items())
