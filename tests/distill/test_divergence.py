from __future__ import annotations

import pytest
import torch

from smelt.distill._divergence import divergence, wide


def squared(log_q, log_p):
    """A rule whose values are easy to follow: D = sum (log q - log p)^2, dD/dz = J^T 2 gap with J = 1 - q 1^T."""
    q, gap = log_q.exp(), log_q - log_p
    return (gap * gap).sum(-1), 2 * (gap - q * gap.sum(-1, keepdim=True))


def test_values_and_gradient_equal_autograd_in_any_slicing():
    for shape in ((3, 4, 50), (7, 50), (50,), (1, 90_000), (5, 300_000)):  # the last ones go slice by slice
        student = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(shape, dtype=torch.float64)
        for temperature in (1.0, 2.5):
            weight = torch.rand(shape[:-1], dtype=torch.float64)
            loss = divergence(student, teacher, temperature, squared)
            got = torch.autograd.grad((loss * weight).sum(), student)[0]
            plain = ((student / temperature).log_softmax(-1) - (teacher / temperature).log_softmax(-1)).square().sum(-1)
            expected = torch.autograd.grad((plain * temperature**2 * weight).sum(), student)[0]
            torch.testing.assert_close(loss, plain * temperature**2)
            torch.testing.assert_close(got, expected)


def test_half_precision_is_computed_in_float32_and_returns_gradients_in_its_own():
    student = torch.randn(4, 9, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(4, 9, dtype=torch.bfloat16)
    loss = divergence(student, teacher, 1.0, squared)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert student.grad.dtype == torch.bfloat16
    torch.testing.assert_close(loss.detach(), squared(student.detach().float().log_softmax(-1), teacher.float().log_softmax(-1))[0])
    assert wide(student).dtype == torch.float32
    assert wide(student.double()).dtype == torch.float64


def test_only_one_buffer_of_logits_is_kept_for_backward():
    student, teacher = torch.randn(6, 100, requires_grad=True), torch.randn(6, 100)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        divergence(student, teacher, 1.0, squared)
    assert kept == [600]


def test_a_second_derivative_is_refused():
    student = torch.randn(2, 5, requires_grad=True)
    loss = divergence(student, torch.randn(2, 5), 1.0, squared)
    slope = torch.autograd.grad(loss.square().sum(), student, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()
