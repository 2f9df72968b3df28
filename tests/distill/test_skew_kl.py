from __future__ import annotations

import itertools
import math

import pytest
import torch

from smelt.distill.forward_kl import ForwardKL
from smelt.distill.skew_kl import SkewKL

V = 13


def slow(student, teacher, alpha, temperature):
    """One position, one token at a time."""
    p = [math.exp(z / temperature) for z in teacher.tolist()]
    q = [math.exp(z / temperature) for z in student.tolist()]
    p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
    return temperature**2 * sum(a * math.log(a / (alpha * a + (1 - alpha) * b)) for a, b in zip(p, q, strict=True))


def pair(*shape, scale=1.0):
    made = torch.Generator().manual_seed(0)
    return [scale * torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.9])
def test_equals_the_slow_sum_and_its_gradient_autograd(alpha, temperature):
    student, teacher = pair(6, V, scale=2)
    objective = SkewKL(alpha, temperature)
    loss = objective(student, teacher)
    for row in range(6):
        assert loss[row].item() == pytest.approx(slow(student[row], teacher[row], alpha, temperature), rel=1e-11)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher), student.requires_grad_())


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_gradient_in_closed_form(alpha):
    student, teacher = pair(4, V)
    student.requires_grad_()
    SkewKL(alpha)(student, teacher).sum().backward()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    r = p / (alpha * p + (1 - alpha) * q)
    torch.testing.assert_close(student.grad, (1 - alpha) * q * ((q * r).sum(-1, keepdim=True) - r), rtol=0, atol=1e-14)


def test_exactly_zero_at_the_teacher():
    student = torch.randn(5, V, requires_grad=True)
    loss = SkewKL()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_never_above_the_logarithm_of_one_over_alpha_which_distributions_apart_reach(alpha):
    student, teacher = pair(200, V, scale=20)
    assert (SkewKL(alpha)(student, teacher) <= math.log(1 / alpha) + 1e-12).all()
    apart = torch.full((2, V), -80.0, dtype=torch.float64)
    apart[0, 0] = apart[1, 1] = 80.0
    assert SkewKL(alpha)(apart[0], apart[1]).item() == pytest.approx(math.log(1 / alpha), abs=1e-9)
    ruled = apart.clone()
    ruled[ruled < 0] = -math.inf
    student = ruled[0].clone().requires_grad_()
    loss = SkewKL(alpha)(student, ruled[1])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 / alpha), abs=1e-12)
    assert not student.grad.any()


def test_goes_to_forward_kl_as_alpha_goes_to_zero_and_grows_on_the_way():
    student, teacher = pair(20, V)
    torch.testing.assert_close(SkewKL(1e-7)(student, teacher), ForwardKL()(student, teacher), rtol=1e-5, atol=0)
    losses = [SkewKL(alpha)(student, teacher) for alpha in (0.9, 0.5, 0.1, 0.01)]
    assert all((more > less).all() for less, more in itertools.pairwise(losses))


def test_a_student_that_is_not_a_number_is_not_hidden():
    assert SkewKL()(torch.full((2, V), math.nan), torch.randn(2, V)).isnan().all()
