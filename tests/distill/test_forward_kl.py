from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.forward_kl import ForwardKL

V = 13


def slow(student, teacher, temperature):
    """One position, one token at a time."""
    p = [math.exp(z / temperature) for z in teacher.tolist()]
    q = [math.exp(z / temperature) for z in student.tolist()]
    return temperature**2 * sum(a / sum(p) * math.log((a / sum(p)) / (b / sum(q))) for a, b in zip(p, q, strict=True))


def pair(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equals_the_slow_sum(temperature):
    student, teacher = pair(2, 3, V)
    got = ForwardKL(temperature)(student, teacher)
    for i in range(2):
        for t in range(3):
            assert got[i, t].item() == pytest.approx(slow(student[i, t], teacher[i, t], temperature), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient_is_t_times_q_minus_p(temperature):
    student, teacher = pair(4, V)
    student.requires_grad_()
    ForwardKL(temperature)(student, teacher).sum().backward()
    expected = temperature * ((student / temperature).softmax(-1) - (teacher / temperature).softmax(-1))
    torch.testing.assert_close(student.grad, expected.detach(), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(lambda z: ForwardKL(temperature)(z, teacher), student.detach().requires_grad_())


def test_exactly_zero_at_the_teacher():
    student = torch.randn(5, V, requires_grad=True)
    loss = ForwardKL()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


def test_a_shift_of_the_logits_changes_nothing_and_it_is_never_negative():
    student, teacher = pair(100, V)
    loss = ForwardKL()(student, teacher)
    torch.testing.assert_close(ForwardKL()(student + 5, teacher - 3), loss)
    assert (loss >= 0).all()


def test_at_high_temperature_the_gradient_goes_to_that_of_centred_logits():
    student, teacher = pair(V)
    limit = ((student - student.mean()) - (teacher - teacher.mean())) / V
    errors = []
    for temperature in (10.0, 100.0, 1000.0):
        z = student.clone().requires_grad_()
        ForwardKL(temperature)(z, teacher).backward()
        errors.append((z.grad - limit).norm().item())
    for near, far in zip(errors[1:], errors, strict=False):
        assert near == pytest.approx(0.1 * far, rel=0.15)


def test_tokens_the_teacher_rules_out_cost_nothing_and_the_rest_is_untouched():
    student, teacher = pair(3, V)
    ruled = teacher.clone()
    ruled[:, :4] = -math.inf
    student.requires_grad_()
    loss = ForwardKL()(student, ruled)
    loss.sum().backward()
    p = ruled.softmax(-1)[:, 4:]
    expected = (p * (p.log() - student.log_softmax(-1)[:, 4:])).sum(-1)
    torch.testing.assert_close(loss, expected)
    assert torch.isfinite(student.grad).all()
    both = student.detach().masked_fill(torch.arange(V) < 4, -math.inf)  # padded logits of both: as if they were not there
    torch.testing.assert_close(ForwardKL()(both, ruled), ForwardKL()(student.detach()[:, 4:], teacher[:, 4:]))
    assert ForwardKL()(both, teacher).isposinf().all()  # ruled out by the student, wanted by the teacher


def test_a_student_that_is_not_a_number_is_not_hidden():
    assert ForwardKL()(torch.full((2, V), math.nan), torch.randn(2, V)).isnan().all()
