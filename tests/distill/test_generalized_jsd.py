from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.generalized_jsd import GeneralizedJSD
from smelt.distill.reverse_kl import ReverseKL
from smelt.spec import SmeltError

V = 13


def slow(student, teacher, beta, temperature):
    """One position, one token at a time."""
    p = [math.exp(z / temperature) for z in teacher.tolist()]
    q = [math.exp(z / temperature) for z in student.tolist()]
    p, q = [a / sum(p) for a in p], [b / sum(q) for b in q]
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    of_p = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
    of_q = sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
    return temperature**2 * (beta * of_p + (1 - beta) * of_q)


def pair(*shape, scale=1.0):
    made = torch.Generator().manual_seed(0)
    return [scale * torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_equals_the_slow_sum_and_its_gradient_autograd(beta, temperature):
    student, teacher = pair(6, V, scale=2)
    objective = GeneralizedJSD(beta, temperature)
    loss = objective(student, teacher)
    for row in range(6):
        assert loss[row].item() == pytest.approx(slow(student[row], teacher[row], beta, temperature), rel=1e-11)
    assert torch.autograd.gradcheck(lambda z: objective(z, teacher), student.requires_grad_())


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_gradient_in_closed_form(beta):
    student, teacher = pair(4, V)
    student.requires_grad_()
    GeneralizedJSD(beta)(student, teacher).sum().backward()
    q, p = student.detach().softmax(-1), teacher.softmax(-1)
    ratio = (q / (beta * p + (1 - beta) * q)).log()
    expected = (1 - beta) * q * (ratio - (q * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(student.grad, expected, rtol=0, atol=1e-14)


def test_exactly_zero_at_the_teacher():
    student = torch.randn(5, V, requires_grad=True)
    loss = GeneralizedJSD()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


def test_divided_by_the_weight_it_goes_to_the_two_kls_at_the_ends_and_to_zero_undivided():
    student, teacher = pair(20, V)
    torch.testing.assert_close(GeneralizedJSD(1e-4)(student, teacher) / 1e-4, ForwardKL()(student, teacher), rtol=1e-3, atol=0)
    torch.testing.assert_close(GeneralizedJSD(1 - 1e-4)(student, teacher) / 1e-4, ReverseKL()(student, teacher), rtol=1e-3, atol=0)
    near = ((GeneralizedJSD(1e-4)(student, teacher) / 1e-4).sum() / ForwardKL()(student, teacher).sum() - 1).abs().item()
    nearer = ((GeneralizedJSD(1e-5)(student, teacher) / 1e-5).sum() / ForwardKL()(student, teacher).sum() - 1).abs().item()
    assert nearer == pytest.approx(0.1 * near, rel=0.1)
    assert (GeneralizedJSD(1e-4)(student, teacher) < 1e-3).all()


def test_swapping_the_sides_swaps_the_weights_and_the_entropy_of_beta_bounds_it():
    student, teacher = pair(20, V, scale=3)
    for beta in (0.2, 0.5):
        torch.testing.assert_close(GeneralizedJSD(beta)(student, teacher), GeneralizedJSD(1 - beta)(teacher, student))
        entropy = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
        assert (GeneralizedJSD(beta)(student, teacher) < entropy).all()
        apart = torch.tensor([0.0, -math.inf], dtype=torch.float64, requires_grad=True)
        loss = GeneralizedJSD(beta)(apart, torch.tensor([-math.inf, 0.0], dtype=torch.float64))
        assert loss.item() == pytest.approx(entropy, abs=1e-12)
        loss.backward()
        assert not apart.grad.any()


def test_the_ends_are_refused_and_name_the_divergence_meant():
    for text, meant in (("beta=0", "forward_kl"), ("beta=0.0", "forward_kl"), ("beta=1", "reverse_kl")):
        with pytest.raises(SmeltError, match=meant):
            registry.parse(f"generalized_jsd({text})", "distill")
    with pytest.raises(SmeltError, match="beta"):
        registry.parse("generalized_jsd(beta=-0.1)", "distill")


def test_a_student_that_is_not_a_number_is_not_hidden():
    assert GeneralizedJSD()(torch.full((2, V), math.nan), torch.randn(2, V)).isnan().all()
