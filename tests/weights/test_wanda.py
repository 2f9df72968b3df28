from __future__ import annotations

import pytest
import torch

from smelt.compress import compress
from smelt.model._walk import linears
from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.magnitude import Magnitude
from smelt.weights.planted_outliers import PlantedOutliers
from smelt.weights.wanda import Wanda


def slow(weight, rms, count, width):
    """Zero one lowest score at a time in every row and every `width` columns."""
    result = weight.clone()
    for row in result:
        for start in range(0, len(row), width):
            score = {j: abs(row[j].item()) * rms[j].item() for j in range(start, start + width)}
            for _ in range(count):
                j = min(score, key=score.get)
                row[j] = 0.0
                del score[j]
    return result


@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.95])
def test_equals_the_loop(sparsity):
    weight, rms = torch.randn(7, 20), torch.rand(20)
    method = Wanda(sparsity=sparsity)
    result = method(weight, rms)
    assert torch.equal(result, slow(weight, rms, round(sparsity * 20), 20))
    assert int((result == 0).sum()) == method.budget([(7, 20)])[0].zeros == 7 * round(sparsity * 20)


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (3, 5)])
def test_patterns_equal_the_loop(n, m):
    weight, rms = torch.randn(7, 40), torch.rand(40)
    method = Wanda(n=n, m=m)
    result = method(weight, rms)
    assert torch.equal(result, slow(weight, rms, m - n, m))
    assert ((result != 0).unflatten(1, (-1, m)).sum(2) == n).all()
    assert int((result == 0).sum()) == method.budget([(7, 40)])[0].zeros


def test_equal_inputs_give_magnitude_bit_for_bit():
    weight = torch.randn(16, 50)
    for scale in (1.0, 0.25):
        assert torch.equal(Wanda(0.37)(weight, torch.full((50,), scale)), Magnitude(0.37)(weight))


def test_inputs_that_never_come_go_first():
    rms = torch.rand(20) + 0.1
    rms[[2, 17]] = 0
    assert (Wanda(0.1)(torch.randn(5, 20) + 9.0, rms) == 0).nonzero()[:, 1].view(5, 2).tolist() == [[2, 17]] * 5


@pytest.mark.parametrize("factor, agreement", [(16.0, 1.0), (20.0, 0.999)])
def test_outliers_do_not_change_the_mask(trained, factor, agreement):
    """A power of 2 is exact, so the masks are equal to the bit; magnitude's are others."""
    model, rows, _ = trained
    masks = {}
    for method in (Wanda(), Magnitude()):
        for planted in (False, True):
            made = PlantedOutliers(factor=factor if planted else 1.0)(model, [])
            compress(made, None, method, rows, progress=None)
            masks[type(method), planted] = torch.cat([(m.weight == 0).flatten() for _, _, m in linears(made)])
    same = {cls: (masks[cls, False] == masks[cls, True]).float().mean().item() for cls in (Wanda, Magnitude)}
    assert same[Wanda] >= agreement > 0.99 > same[Magnitude]


def test_settings_that_contradict_each_other():
    with pytest.raises(SmeltError, match="wanda: n=2 and m=0"):
        parse("wanda(n=2)", "weights")
    with pytest.raises(SmeltError, match=r"leaves sparsity=0\.5, not 0\.7"):
        parse("wanda(n=2, m=4, sparsity=0.7)", "weights")
    with pytest.raises(SmeltError, match="m=4 does not divide the 6 columns"):
        Wanda(n=2, m=4)(torch.randn(2, 6), torch.ones(6))
