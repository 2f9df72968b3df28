from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL

V = 13


def slow(student, teacher, temperature):
    """One position, one token at a time."""
    p = [math.exp(z / temperature) for z in teacher.tolist()]
    q = [math.exp(z / temperature) for z in student.tolist()]
    return temperature**2 * sum(b / sum(q) * math.log((b / sum(q)) / (a / sum(p))) for a, b in zip(p, q, strict=True))


def pair(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equals_the_slow_sum(temperature):
    student, teacher = pair(2, 3, V)
    got = ReverseKL(temperature)(student, teacher)
    for i in range(2):
        for t in range(3):
            assert got[i, t].item() == pytest.approx(slow(student[i, t], teacher[i, t], temperature), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_the_closed_form(temperature):
    student, teacher = pair(4, V)
    student.requires_grad_()
    ReverseKL(temperature)(student, teacher).sum().backward()
    log_q, log_p = (student.detach() / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1, keepdim=True)
    torch.testing.assert_close(student.grad, temperature * log_q.exp() * (log_q - log_p - kl), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: ReverseKL(temperature)(z, teacher), student.detach().requires_grad_())


def test_it_is_the_forward_one_with_the_roles_exchanged():
    student, teacher = pair(50, V)
    torch.testing.assert_close(ReverseKL(2.0)(student, teacher), ForwardKL(2.0)(teacher, student))


def test_exactly_zero_at_the_teacher():
    student = torch.randn(5, V, requires_grad=True)
    loss = ReverseKL()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


def test_tokens_the_student_never_says_cost_nothing_and_those_the_teacher_rules_out_cost_infinity():
    student, teacher = pair(3, V)
    silent = student.masked_fill(torch.arange(V) < 4, -math.inf).requires_grad_()
    loss = ReverseKL()(silent, teacher)
    loss.sum().backward()
    log_q = silent.detach().log_softmax(-1)[:, 4:]
    torch.testing.assert_close(loss.detach(), (log_q.exp() * (log_q - teacher.log_softmax(-1)[:, 4:])).sum(-1))
    assert torch.isfinite(silent.grad).all()
    assert not silent.grad[:, :4].any()
    both = teacher.masked_fill(torch.arange(V) < 4, -math.inf)
    torch.testing.assert_close(ReverseKL()(silent, both).detach(), ReverseKL()(student[:, 4:], teacher[:, 4:]))
    assert ReverseKL()(student, both).isposinf().all()


def test_it_prefers_one_mode_where_the_forward_one_covers_both():
    teacher = torch.tensor([math.log(0.5 - 1e-4), math.log(0.5 - 1e-4), math.log(2e-4)], dtype=torch.float64)
    covering = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64).log()
    seeking = torch.tensor([0.98, 0.01, 0.01], dtype=torch.float64).log()
    assert ReverseKL()(seeking, teacher) < ReverseKL()(covering, teacher)
    assert ForwardKL()(seeking, teacher) > ForwardKL()(covering, teacher)
