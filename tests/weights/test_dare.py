from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse, text
from smelt.spec import SmeltError
from smelt.weights.dare import Dare
from smelt.weights.task_arithmetic import TaskArithmetic
from smelt.weights.ties import Ties


def test_every_entry_is_at_the_base_or_rescaled():
    base, model = torch.randn(60, 70), torch.randn(60, 70)
    for drop in (0.1, 0.5, 0.9):
        made = Dare(drop=drop)("w", [model], base)
        kept = made != base
        assert_close(made[kept].double(), (base.double() + (model.double() - base.double()) / (1 - drop))[kept], rtol=0, atol=1e-5)
        share, sigma = kept.float().mean().item(), (drop * (1 - drop) / kept.numel()) ** 0.5
        assert abs(share - (1 - drop)) < 4 * sigma


def test_the_mean_over_masks_is_the_model():
    """Within five standard errors at every entry, and their squares average to one: variance d^2 p / (1 - p)."""
    base, model, drop, count = torch.randn(12, 10), torch.randn(12, 10), 0.9, 1000
    mean = sum(Dare(drop=drop, seed=seed)("w", [model], base).double() for seed in range(count)) / count
    error = (model - base).double().abs() * (drop / (1 - drop) / count) ** 0.5
    z = (mean - model.double()) / error
    assert z.abs().max() < 5
    assert 0.6 < z.square().mean().item() < 1.4  # mean of 120 chi-squares: 1 +- 0.13


def test_masks_differ_by_name_seed_and_model_and_repeat():
    base, model = torch.zeros(2000), torch.ones(2000)

    def mask(name="w", seed=0):
        return Dare(seed=seed)(name, [model], base) != 0

    assert torch.equal(mask(), mask())
    both = Dare(merge=TaskArithmetic(models=("b",)))("w", [model, model], base)
    assert sorted(both.unique().tolist()) == pytest.approx([0.0, 10.0, 20.0])  # two masks, not one
    for other in (mask("v"), mask(seed=1)):
        assert (mask() & other).sum() < 0.3 * mask().sum()  # independent: a tenth


def test_dropping_nothing_is_the_method_it_holds():
    base = torch.randn(30)
    tensors = [base + 0.1 * torch.randn(30) for _ in range(2)]
    for merge in (TaskArithmetic(models=("b",), scale=0.5), Ties(models=("b",))):
        assert torch.equal(Dare(merge=merge, drop=0.0)("w", tensors, base), merge("w", tensors, base))
    assert torch.equal(Dare(drop=0.0)("w", tensors[:1], base), tensors[0])


def test_it_holds_any_method_with_a_base():
    method = parse("dare(merge=ties(models=['b'], base='start', density=1.0), drop=0.5)", "weights")
    assert method.models == ("b",) and method.base == "start" and method.needs_base
    assert parse(text(method), "weights") == method
    base, tensors = torch.zeros(500), [torch.ones(500), -3 * torch.ones(500)]
    made = method("w", tensors, base)
    assert sorted(made.unique().tolist()) == [-6.0, 0.0, 2.0]  # both kept: the larger sum, -6, is elected
    with pytest.raises(SmeltError, match=r"merge=linear\(\) has no base"):
        parse("dare(merge=linear())", "weights")
    with pytest.raises(SmeltError, match="no merging method"):
        parse("dare(merge=magnitude())", "weights")
    with pytest.raises(SmeltError, match="drop"):
        parse("dare(drop=1.0)", "weights")
