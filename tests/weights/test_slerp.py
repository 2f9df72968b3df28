from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.slerp import Slerp


def slow(a, b, t):
    """Plain numbers, float64."""
    x, y = (v.double().flatten().tolist() for v in (a, b))
    dot, xx, yy = sum(map(lambda p, q: p * q, x, y)), sum(p * p for p in x), sum(q * q for q in y)
    angle = math.acos(dot / math.sqrt(xx * yy))
    f, g = math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
    return torch.tensor([f * p + g * q for p, q in zip(x, y)], dtype=torch.float64).view(a.shape)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_equals_the_formula(t):
    a, b = torch.randn(6, 7), 3 * torch.randn(6, 7)
    assert_close(Slerp(t=t)("w", [a, b]).double(), slow(a, b, t), rtol=0, atol=2e-6)
    assert not torch.allclose(slow(a, b, t), (1 - t) * a.double() + t * b.double(), atol=1e-2)  # the straight way is another


def test_the_ends_are_the_models_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        for shape in ((5, 8), (8,)):
            a, b = (torch.randn(shape).to(dtype) for _ in range(2))
            assert torch.equal(Slerp(t=0.0)("w", [a, b]), a) and torch.equal(Slerp(t=1.0)("w", [a, b]), b)
            assert torch.equal(Slerp(t=0.3)("w", [a, a.clone()]), a)


@pytest.mark.parametrize("degrees", [3.0, 60.0, 90.0, 170.0])
def test_on_a_circle_the_angle_grows_evenly_and_the_length_stays(degrees):
    angle = math.radians(degrees)
    e, f = torch.linalg.qr(torch.randn(40, 2, dtype=torch.float64))[0].T
    a, b = 5 * e, 5 * (math.cos(angle) * e + math.sin(angle) * f)
    for t in (0.2, 0.5, 0.9):
        made = Slerp(t=t)("w", [a.view(8, 5), b.view(8, 5)]).flatten()
        assert made.norm().item() == pytest.approx(5, rel=1e-9)
        assert_close(made, 5 * (math.cos(t * angle) * e + math.sin(t * angle) * f), rtol=0, atol=1e-9)


def test_nearly_parallel_tensors_go_straight_and_nothing_jumps_there():
    a, other = torch.randn(20, 20), torch.randn(20, 20)
    for size, straight in ((0.001, True), (0.0315, None), (0.033, None), (0.1, False)):
        b = a + size * other
        made, line = Slerp(t=0.5)("w", [a, b]), (a.double() + b.double()) / 2
        assert_close(made.double(), line, rtol=2e-3, atol=2e-6 if straight else 1e-2)  # 1 - cos(O / 2) is 1.25e-4 at the border
        if straight is not None:
            assert (((made.double() - line).norm() / line.norm()).item() < 1e-6) == straight
    opposite = Slerp(t=0.25)("w", [a, -a])
    assert_close(opposite, 0.5 * a)  # no circle is the shortest: straight through


def test_one_dimension_and_zeros_go_straight():
    a, b = torch.randn(30), torch.randn(30)
    assert_close(Slerp(t=0.3)("w", [a, b]), 0.7 * a + 0.3 * b)
    matrix = torch.randn(4, 4)
    assert_close(Slerp(t=0.3)("w", [torch.zeros(4, 4), matrix]), 0.3 * matrix)


def test_exchanging_the_models_turns_t_round():
    a, b = torch.randn(5, 9), torch.randn(5, 9)
    assert_close(Slerp(t=0.3)("w", [a, b]), Slerp(t=0.7)("w", [b, a]))


def test_angles_are_float64_over_chunks():
    """2^21 and more entries take several chunks; the angle is that of the whole."""
    a, b = torch.randn(1500, 1500), torch.randn(1500, 1500)
    angle = math.acos((a.double() * b.double()).sum().item() / a.double().norm().item() / b.double().norm().item())
    want = math.sin(0.5 * angle) / math.sin(angle) * (a.double() + b.double())
    assert_close(Slerp()("w", [a, b]).double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "source, message", [("slerp(models=['a', 'b'])", "names 2"), ("slerp(models=[])", "names 0"), ("slerp(t=1.5)", "t")]
)
def test_what_makes_no_sense_is_refused(source, message):
    with pytest.raises(SmeltError, match=message):
        parse(source, "weights")
