from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.task_arithmetic import TaskArithmetic


def slow(base, tensors, scale, weights):
    result = torch.zeros(base.shape, dtype=torch.float64)
    for index in itertools.product(*map(range, base.shape)):
        start = base[index].item()
        result[index] = start + scale * sum(w * (t[index].item() - start) for w, t in zip(weights, tensors))
    return result


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, -0.5])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, -1.0, 2.0)])
def test_equals_the_loop(scale, weights):
    base = torch.randn(4, 5)
    tensors = [base + 0.1 * torch.randn(4, 5) for _ in range(3)]
    made = TaskArithmetic(models=("b", "c"), scale=scale, weights=weights)("w", tensors, base)
    assert_close(made.double(), slow(base, tensors, scale, weights), rtol=0, atol=3e-6)
    if len(set(weights)) == 1:
        assert torch.equal(made, TaskArithmetic(models=("b", "c"), scale=scale)("w", tensors, base))


def test_the_base_and_the_model_come_back_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        base, model = (torch.randn(50).to(dtype) for _ in range(2))
        assert torch.equal(TaskArithmetic()("w", [model], base), model)
        assert torch.equal(TaskArithmetic(scale=0.0)("w", [model], base), base)
        pick = TaskArithmetic(models=("b",), weights=(0.0, 1.0))
        assert torch.equal(pick("w", [base, model], torch.randn(50).to(dtype)), model)


def test_adding_a_task_and_taking_it_away_restores_the_model():
    base, other = torch.randn(40), torch.randn(40)
    model = base + 0.1 * torch.randn(40)
    added = TaskArithmetic(models=("b",))("w", [model, other], base)
    assert_close(added, model + other - base)
    restored = TaskArithmetic(models=("b",), weights=(1.0, -1.0))("w", [added, other], base)
    assert_close(restored, model, rtol=0, atol=1e-6)
    # in whole numbers there is no rounding
    base, model, other = (torch.randint(-50, 50, (40,)).float() for _ in range(3))
    added = TaskArithmetic(models=("b",))("w", [model, other], base)
    assert torch.equal(TaskArithmetic(models=("b",), weights=(1.0, -1.0))("w", [added, other], base), model)
    assert torch.equal(TaskArithmetic(models=("b",), weights=(1.0, -1.0))("w", [model, model], base), base)


def test_an_analogy_and_negation():
    """c + (b - a) in one call, and a task that is forgotten: theta_0 - (theta - theta_0)."""
    a, b, c, base = (torch.randn(20) for _ in range(4))
    assert_close(TaskArithmetic(models=("b", "a"), weights=(1.0, 1.0, -1.0))("w", [c, b, a], base), c + b - a, rtol=0, atol=2e-6)
    assert_close(TaskArithmetic(scale=-1.0)("w", [a], base), 2 * base - a, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "source, message",
    [
        ("task_arithmetic(weights=[1.0, 1.0])", "2 weights for 1 models"),
        ("task_arithmetic(scale=1e999)", "finite"),
        ("task_arithmetic(base=3)", "base"),
    ],
)
def test_what_makes_no_sense_is_refused(source, message):
    with pytest.raises(SmeltError, match=message):
        parse(source, "weights")
