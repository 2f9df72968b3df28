from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.reverse_kl import ReverseKL
from smelt.distill.skew_kl import SkewKL
from smelt.distill.skew_reverse_kl import SkewReverseKL

V = 13


def slow(student, teacher, alpha, temperature):
    """One position, one token at a time."""
    p = [math.exp(z / temperature) for z in teacher.tolist()]
    q = [math.exp(z / temperature) for z in student.tolist()]
    p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
    return temperature**2 * sum(b * math.log(b / (alpha * b + (1 - alpha) * a)) for a, b in zip(p, q, strict=True))


def pair(*shape, scale=1.0):
    made = torch.Generator().manual_seed(0)
    return [scale * torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.9])
def test_equals_the_slow_sum_and_its_gradient_autograd(alpha, temperature):
    student, teacher = pair(6, V, scale=2)
    objective = SkewReverseKL(alpha, temperature)
    loss = objective(student, teacher)
    for row in range(6):
        assert loss[row].item() == pytest.approx(slow(student[row], teacher[row], alpha, temperature), rel=1e-11)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher), student.requires_grad_())


@pytest.mark.parametrize("alpha", [0.1, 0.5])
def test_gradient_in_closed_form(alpha):
    student, teacher = pair(4, V)
    student.requires_grad_()
    SkewReverseKL(alpha)(student, teacher).sum().backward()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    r = q / (alpha * q + (1 - alpha) * p)
    g = r.log() - alpha * r
    torch.testing.assert_close(student.grad, q * (g - (q * g).sum(-1, keepdim=True)), rtol=0, atol=1e-14)


def test_exactly_zero_at_the_teacher():
    student = torch.randn(5, V, requires_grad=True)
    loss = SkewReverseKL()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


def test_it_is_skew_kl_with_the_sides_swapped():
    student, teacher = pair(20, V, scale=3)
    torch.testing.assert_close(SkewReverseKL(0.3)(student, teacher), SkewKL(0.3)(teacher, student))


@pytest.mark.parametrize("alpha", [0.01, 0.1, 0.5])
def test_a_token_the_teacher_rules_out_costs_at_most_the_logarithm_of_one_over_alpha(alpha):
    student, teacher = pair(200, V, scale=20)
    assert (SkewReverseKL(alpha)(student, teacher) <= math.log(1 / alpha) + 1e-12).all()
    ruled = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]], dtype=torch.float64)
    student = ruled[0].clone().requires_grad_()
    loss = SkewReverseKL(alpha)(student, ruled[1])
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 / alpha), abs=1e-12)
    assert not student.grad.any()


def test_goes_to_reverse_kl_as_alpha_goes_to_zero():
    student, teacher = pair(20, V)
    torch.testing.assert_close(SkewReverseKL(1e-7)(student, teacher), ReverseKL()(student, teacher), rtol=1e-5, atol=0)


def test_a_student_that_is_not_a_number_is_not_hidden():
    assert SkewReverseKL()(torch.full((2, V), math.nan), torch.randn(2, V)).isnan().all()
