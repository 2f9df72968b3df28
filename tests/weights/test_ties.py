from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.ties import Ties


def slow(base, tensors, density, scale):
    """Trim, elect, average: one entry at a time."""
    start = base.flatten().tolist()
    changes = [[x - s for x, s in zip(t.flatten().tolist(), start)] for t in tensors]
    keep = round(density * len(start))
    for change in changes:
        order = sorted(range(len(change)), key=lambda i: (-abs(change[i]), i))
        for i in order[keep:]:
            change[i] = 0.0
    result = []
    for i, s in enumerate(start):
        total = sum(change[i] for change in changes)
        agreeing = [change[i] for change in changes if change[i] * total > 0]
        result.append(s + scale * sum(agreeing) / len(agreeing) if agreeing else s)
    return torch.tensor(result, dtype=torch.float64).view_as(base)


def quarters(*shape):
    """Multiples of 1/4: differences are exact, and ties and sums of zero occur."""
    return torch.randint(-8, 9, shape) / 4


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.7, 1.0, 1.5])
def test_equals_the_loop(count, density, scale):
    for draw in (torch.randn, quarters):
        base, tensors = draw(6, 7), [draw(6, 7) for _ in range(count)]
        made = Ties(models=("x",) * (count - 1), density=density, scale=scale)("w", tensors, base)
        assert_close(made.double(), slow(base, tensors, density, scale), rtol=0, atol=3e-6)


def test_the_sign_is_that_of_the_larger_sum_not_of_the_majority():
    base = torch.zeros(3)
    tensors = [torch.tensor([5.0, 1.0, 0.0]), torch.tensor([-1.0, 1.0, -2.0]), torch.tensor([-2.0, -3.0, 0.0])]
    made = Ties(models=("b", "c"), density=1.0)("w", tensors, base)
    assert made.tolist() == [5.0, -3.0, -2.0]  # zeros do not count in the mean


def test_trimming_keeps_the_largest_and_ties_go_to_the_first():
    base = torch.zeros(2, 5)
    one = torch.tensor([[0.1, -0.9, 0.5, 0.5, 0.2], [0.5, 0.0, -0.5, 0.3, 0.8]])
    for density, kept in ((0.2, [1, 9]), (0.3, [1, 2, 9]), (0.4, [1, 2, 3, 9]), (0.6, [1, 2, 3, 5, 7, 9])):
        made = Ties(density=density)("w", [one], base)
        assert made.flatten().nonzero().flatten().tolist() == kept
        assert torch.equal(made.flatten()[kept], one.flatten()[kept])
    assert int((Ties(density=0.29)("w", [torch.ones(100)], torch.zeros(100)) != 0).sum()) == 29


def test_one_model_equal_models_and_opposite_ones():
    for dtype in (torch.float32, torch.bfloat16):
        base, model = (torch.randn(60).to(dtype) for _ in range(2))
        assert torch.equal(Ties(density=1.0)("w", [model], base), model)
        for count in (2, 3, 7):
            assert torch.equal(Ties(models=("x",) * (count - 1), density=1.0)("w", [model] * count, base), model)
        assert torch.equal(Ties(models=("b",), density=1.0)("w", [base, model], base), model), "a model at the base has no vote"
        assert torch.equal(Ties(scale=0.0)("w", [model], base), base)
    base, change = quarters(60), quarters(60)
    assert torch.equal(Ties(models=("b",), density=1.0)("w", [base + change, base - change], base), base)


def test_the_order_of_models_does_not_matter():
    base = quarters(30)
    tensors = [quarters(30) for _ in range(3)]
    made = [Ties(models=("x", "y"), density=0.5)("w", list(order), base) for order in itertools.permutations(tensors)]
    for other in made[1:]:
        assert_close(other, made[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("source", ["ties(density=0.0)", "ties(density=1.2)", "ties(scale=-1.0)"])
def test_what_makes_no_sense_is_refused(source):
    with pytest.raises(SmeltError, match=source[5:10]):
        parse(source, "weights")
