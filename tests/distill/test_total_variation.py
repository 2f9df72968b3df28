from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.forward_kl import ForwardKL
from smelt.distill.total_variation import TotalVariation

V = 13


def slow(student, teacher):
    """One minus the mass both have, one token at a time."""
    p, q = [math.exp(z) for z in teacher.tolist()], [math.exp(z) for z in student.tolist()]
    return 1 - sum(min(a / sum(p), b / sum(q)) for a, b in zip(p, q, strict=True))


def pair(*shape, scale=1.0):
    made = torch.Generator().manual_seed(0)
    return [scale * torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


def test_equals_what_the_two_do_not_share_and_its_gradient_autograd():
    student, teacher = pair(2, 3, V)
    loss = TotalVariation()(student, teacher)
    for i in range(2):
        for t in range(3):
            assert loss[i, t].item() == pytest.approx(slow(student[i, t], teacher[i, t]), rel=1e-12)
    assert torch.autograd.gradcheck(lambda z: TotalVariation()(z, teacher), student.requires_grad_())


def test_gradient_in_closed_form():
    student, teacher = pair(4, V)
    student.requires_grad_()
    TotalVariation()(student, teacher).sum().backward()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    side = (q - p).sign()
    torch.testing.assert_close(student.grad, q * (side - (q * side).sum(-1, keepdim=True)) / 2, rtol=0, atol=1e-15)


def test_exactly_zero_at_the_teacher_and_one_where_nothing_is_shared():
    student = torch.randn(5, V, requires_grad=True)
    loss = TotalVariation()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()
    assert TotalVariation()(torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])).item() == 1


def test_symmetric_and_below_the_bound_of_pinsker():
    student, teacher = pair(200, V, scale=2)
    loss = TotalVariation()(student, teacher)
    torch.testing.assert_close(loss, TotalVariation()(teacher, student))
    assert (loss <= (ForwardKL()(student, teacher) / 2).sqrt()).all()


def test_a_student_that_is_not_a_number_is_not_hidden():
    assert TotalVariation()(torch.full((2, V), math.nan), torch.randn(2, V)).isnan().all()
