from __future__ import annotations

import pytest
import torch

from smelt.distill.adaptive_kl import AdaptiveKL
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL

V = 13


def share(student, teacher, mu, temperature=1.0):
    """Of the head in all that differs, one token at a time from the least likely on."""
    p, q = (teacher / temperature).softmax(-1).tolist(), (student / temperature).softmax(-1).tolist()
    mass, tail = 0.0, set()
    for token in sorted(range(len(p)), key=lambda v: p[v]):
        mass += p[token]
        if mass <= mu:
            tail.add(token)
    head = sum(abs(p[v] - q[v]) for v in range(len(p)) if v not in tail)
    return head / sum(abs(a - b) for a, b in zip(p, q, strict=True))


def pair(*shape, scale=1.0):
    made = torch.Generator().manual_seed(0)
    return [scale * torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("mu", [0.1, 0.5, 0.8])
def test_equals_the_weighted_sum_of_the_two_and_so_does_its_gradient(mu, temperature):
    student, teacher = pair(6, V, scale=2)
    z, plain = student.clone().requires_grad_(), student.clone().requires_grad_()
    loss = AdaptiveKL(mu, temperature)(z, teacher)
    h = torch.tensor([share(student[i], teacher[i], mu, temperature) for i in range(6)], dtype=torch.float64)
    expected = h * ForwardKL(temperature)(plain, teacher) + (1 - h) * ReverseKL(temperature)(plain, teacher)
    assert 0.01 < h.mean() < 0.95  # both divergences count
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=0)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(z.grad, plain.grad, rtol=0, atol=1e-13)


def test_gaps_are_put_into_the_order_of_the_mask():
    """A student that errs in the head only learns by forward KL, in the tail only by reverse KL, wherever the head lies."""
    for order in (torch.arange(V), torch.arange(V).flip(0), torch.randperm(V, generator=torch.Generator().manual_seed(1))):
        p = torch.full((V,), 0.25 / 11, dtype=torch.float64)
        p[order[0]], p[order[1]] = 0.40, 0.35
        head, tail = p.clone(), p.clone()
        head[order[0]], head[order[1]] = 0.35, 0.40
        tail[order[2]], tail[order[3]] = p[order[2]] / 2, p[order[3]] * 1.5
        for q, alone in ((head, ForwardKL()), (tail, ReverseKL())):
            torch.testing.assert_close(AdaptiveKL()(q.log(), p.log()), alone(q.log(), p.log()))


def test_exactly_zero_at_the_teacher():
    student = torch.randn(5, V, requires_grad=True)
    loss = AdaptiveKL()(student, student.detach())
    loss.sum().backward()
    assert not loss.any()
    assert not student.grad.any()


def test_the_order_of_the_vocabulary_does_not_matter():
    student, teacher = pair(20, V)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(AdaptiveKL()(student[:, order], teacher[:, order]), AdaptiveKL()(student, teacher))


def test_a_student_that_is_not_a_number_is_not_hidden():
    assert AdaptiveKL()(torch.full((2, V), float("nan")), torch.randn(2, V)).isnan().all()
