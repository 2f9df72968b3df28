from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked
from smelt.rank._blocks import mask, stack
from smelt.rank._order import by_digest
from smelt.rank._training import FILE, Labelled, write
from smelt.rank.self_calibrated import SelfCalibrated, calibrated
from smelt.registry import check, parse, text
from smelt.spec import SmeltError

PASSAGES = [f"def function_{i}(x):\n    return x * {i * i}\n" for i in range(9)]


def loaded(architecture="llama", **more):
    return Loaded(tiny(architecture, **{"context": 512} | more), tiny_tokenizer(), None)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    write(SelfCalibrated(), SelfCalibrated().heads(tiny("llama").config), folder)
    return str(folder)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_scores_are_the_heads_on_the_states_of_the_dense_mask(architecture, weights):
    model = loaded(architecture)
    asked = [Asked("times three", PASSAGES), Asked("another", PASSAGES[:2]), Asked("q", ["", "x"])]
    for view in ("list", "point"):
        judge = SelfCalibrated(view=view, weights=weights)
        head = judge.heads(model.model.config)
        head.load_state_dict(load_file(Path(weights) / FILE))
        for one, found in zip(asked, judge.scores(asked, model), strict=True):
            laid, ends, slots = judge._lay(one.query, one.passages, model)
            batch = stack([laid])
            with torch.no_grad():
                states = model.model.base_model(batch.ids, attention_mask=mask(batch.segment), position_ids=batch.positions)
                expected = head[view](states.last_hidden_state[0, ends if view == "point" else slots])[:, 0]
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_where_scores_are_read():
    model, words = loaded(), tiny_tokenizer()
    laid, ends, slots = SelfCalibrated()._lay("q", ["x", "", "y z"], model)
    for i, passage in enumerate(["x", "", "y z"]):
        part = laid.ids[laid.segment == i + 1]
        assert words.decode(part) == f"{passage}\n> [{i + 1}]"
        start = int((laid.segment == i + 1).nonzero()[0])
        assert words.decode(laid.ids[start : ends[i] + 1]) == f"{passage}\n>"
        assert words.decode(laid.ids[: slots[i] + 1]).endswith("other:\n" + "".join(f" [{j}]" for j in range(1, i + 2)))
    assert int(slots[-1]) == len(laid.ids) - 1


def test_point_view_scores_are_the_same_in_every_window_and_list_view_ones_are_not(weights):
    model = loaded()
    whole, moved = {}, {}
    for view in ("point", "list"):
        judge = SelfCalibrated(view=view, weights=weights)
        whole = judge.scores([Asked("times three", PASSAGES)], model)[0]
        gap = []
        for places in ([8, 2, 5], [0, 1, 2, 3], [4], list(range(8, -1, -1))):
            part = judge.scores([Asked("times three", [PASSAGES[i] for i in places])], model)[0]
            gap.append(float((part - whole[places]).abs().max()))
        moved[view] = max(gap)
    assert moved["point"] < 1e-6 and moved["list"] > 1e-3


def slow(y, z, grades, there, beta):
    """Loops in float64."""
    lists, windows, n = y.shape
    places = [[(w, i) for w in range(windows) for i in range(n) if there[b, w, i]] for b in range(lists)]
    top = [max(float(grades[b, w, i]) for w, i in places[b]) for b in range(lists)]
    lesser = sum(math.exp(z[b, w, i]) for b in range(lists) for w, i in places[b] if grades[b, w, i] < top[b])
    found = []
    for b in range(lists):
        each = []
        for w in range(windows):
            mine = [i for i in range(n) if there[b, w, i]]
            rank = {i: r + 1 for r, i in enumerate(sorted(mine, key=lambda i: -float(grades[b, w, i])))}
            total = 0.0
            for i in mine:
                for j in mine:
                    if grades[b, w, i] > grades[b, w, j]:
                        total += math.log1p(math.exp(y[b, w, j] - y[b, w, i])) / (rank[i] + rank[j])
            if len(mine) > 1:
                each.append(total * 2 / (len(mine) * (len(mine) - 1)))
        listed = sum(each) / max(1, len(each))
        best = [(w, i) for w, i in places[b] if grades[b, w, i] == top[b]]
        good = sum(math.exp(z[b, w, i]) for w, i in best)
        sum_z, sum_y = (sum(math.exp(t[b, w, i]) for w, i in places[b]) for t in (z, y))
        kl = sum(math.exp(z[b, w, i]) / sum_z * (z[b, w, i] - math.log(sum_z) - y[b, w, i] + math.log(sum_y)) for w, i in places[b])
        first = max(places[b], key=lambda p: float(z[b, p[0], p[1]])) in best
        found.append(listed - math.log(good / (good + lesser)) + (1.0 if first else good / sum_z) * beta * float(kl))
    return torch.tensor(found, dtype=torch.float64)


def example():
    random = torch.Generator().manual_seed(4)
    y, z = torch.randn(2, 3, 2, 4, generator=random, dtype=torch.float64)
    grades = torch.randint(0, 3, (3, 2, 4), generator=random).double()
    there = torch.ones(3, 2, 4, dtype=torch.bool)
    there[0, 1, 2:], there[2, 1], there[1, 0, 1:] = False, False, False
    return y, z, grades, there


def test_the_loss_is_that_of_the_loops():
    y, z, grades, there = example()
    for beta in (0.0, 0.5, 1.0):
        torch.testing.assert_close(calibrated(y, z, grades, there, beta), slow(y, z, grades, there, beta), atol=1e-12, rtol=1e-12)
    junk = y.masked_fill(~there, 1e4), z.masked_fill(~there, -1e4), grades.masked_fill(~there, 99.0)
    torch.testing.assert_close(calibrated(*junk, there, 1.0), calibrated(y, z, grades, there, 1.0))


def test_the_free_constant_of_a_window_is_what_calibration_takes_away():
    """Without it any number can be added to the scores of a window; with it the gradient sums to zero over the list only."""
    y, z, grades, there = example()
    shifted = y.clone()
    shifted[:, 0] += 3
    torch.testing.assert_close(calibrated(shifted, z, grades, there, 0.0), calibrated(y, z, grades, there, 0.0))
    moved = calibrated(shifted, z, grades, there, 1.0) - calibrated(y, z, grades, there, 1.0)
    assert moved[:2].abs().min() > 0.01 and moved[2].abs() < 1e-9  # the last list has one window only
    y.requires_grad_(), z.requires_grad_()
    calibrated(y, z, grades, there, 1.0).sum().backward()
    assert torch.isfinite(y.grad).all() and torch.isfinite(z.grad).all() and (y.grad[~there] == 0).all() and (z.grad[~there] == 0).all()
    torch.testing.assert_close(y.grad.sum((1, 2)), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert y.grad[:2].sum(2).abs().min() > 1e-3
    alone = z.detach().requires_grad_()
    calibrated(y.detach(), alone, grades, there, 0.0).sum().backward()
    torch.testing.assert_close(alone.grad, z.grad)  # calibration does not pull the point view


def lists():
    words = ["apple", "river", "stone", "cloud"]
    return [Labelled(w, [f"def {v}(): pass" for v in [w, *(o for o in words if o != w)]], [1.0, 0.0, 0.0, 0.0]) for w in words]


def test_a_batch_deals_every_list_into_windows_once():
    model, judge = loaded(), SelfCalibrated(windows=3)
    rows = [lists()[0], Labelled("q", ["a", "b"], [2.0, 0.5])]
    batch = judge.collate(rows, model, 600)
    assert all(len(value) == 6 for value in batch.values())
    for at, one in enumerate(rows):
        order, seen = by_digest(one.query, one.passages), []
        for w in range(3):
            window = order[w::3]
            laid, ends, slots = judge._lay(one.query, [one.passages[i] for i in window], model)
            row, n = 3 * at + w, len(window)
            assert batch["ids"][row, : len(laid.ids)].tolist() == laid.ids.tolist()
            assert batch["ends"][row].tolist() == ends.tolist() + [-1] * (2 - n)
            assert batch["slots"][row].tolist() == slots.tolist() + [-1] * (2 - n)
            assert batch["grades"][row, :n].tolist() == [one.grades[i] for i in window]
            seen += window
        assert sorted(seen) == list(range(len(one.passages)))
    assert judge.collate([Labelled("q " * 90, ["x y z " * 90] * 5, [1.0, 0, 0, 0, 0])], model, 450)["ids"].shape[1] <= 150


def test_thirty_steps_teach_both_views_the_lists(tmp_path):
    model, judge = loaded(), SelfCalibrated()
    torch.manual_seed(0)
    heads, batch = judge.heads(model.model.config), judge.collate(lists(), model, 400)
    optimizer, losses = torch.optim.AdamW([*model.model.parameters(), *heads.parameters()], lr=3e-3), []
    model.model.train()
    for _ in range(30):
        loss = judge.loss(model.model, heads, batch)
        assert loss.shape == (4,) and loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
        losses.append(loss.mean().item())
    model.model.eval()
    assert losses[-1] < 0.3 * losses[0]
    write(judge, heads, tmp_path)
    for one in lists():
        order = by_digest(one.query, one.passages)
        for view in ("list", "point"):
            trained = SelfCalibrated(view=view, weights=str(tmp_path))
            scores: dict[int, float] = {}
            for window in (order[0::2], order[1::2]):  # of each window alone; the numbers compare
                found = trained.scores([Asked(one.query, [one.passages[i] for i in window])], model)[0]
                scores |= dict(zip(window, found.tolist(), strict=True))
            assert max(scores, key=lambda i: scores[i]) == 0, (view, one.query)


def test_settings(weights):
    assert text(parse("self_calibrated(view='point', beta=0.5)", "rank")) == "self_calibrated(view='point', beta=0.5)"
    check(SelfCalibrated())
    for bad in ("view='both'", "length=0", "windows=0", "beta=-1.0"):
        with pytest.raises(SmeltError):
            parse(f"self_calibrated({bad})", "rank")
    with pytest.raises(SmeltError, match="needs a decoder"):
        SelfCalibrated().scores([Asked("q", ["a"])], None)
    with pytest.raises(SmeltError, match="self_calibrated has parameters that have to be trained"):
        SelfCalibrated().scores([Asked("q", ["a"])], loaded())
    model = loaded()
    with torch.no_grad():
        model.model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(SmeltError, match="not finite"):
        SelfCalibrated(weights=weights).scores([Asked("q", ["a", "b"])], model)
