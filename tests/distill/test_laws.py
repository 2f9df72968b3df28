"""Laws of every objective, whatever it is called: run through the step and the reduction of the training loop."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch

from smelt import registry
from smelt.distill import READS
from smelt.train import kept_mean, language_step, reads

B, T, V, D, LAYERS = 2, 5, 11, 7, 3


@pytest.fixture(params=registry.names("distill"))
def objective(request):
    return registry.parse(request.param, "distill")


class Stub(torch.nn.Module):
    """A model whose logits and hidden states are its parameters."""

    def __init__(self, logits, hidden):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())
        self.hidden = torch.nn.ParameterList(h.clone() for h in hidden)

    def forward(self, input_ids, use_cache, output_hidden_states, **extra):
        return SimpleNamespace(logits=self.logits, hidden_states=tuple(self.hidden) if output_hidden_states else None)


def tensors(seed=0, scale=2.0, dtype=torch.float32):
    made = torch.Generator().manual_seed(seed)
    pair = [scale * torch.randn(B, T, V, generator=made, dtype=dtype) for _ in range(2)]
    hidden = [[torch.randn(B, T, D, generator=made, dtype=dtype) for _ in range(LAYERS)] for _ in range(2)]
    labels = torch.randint(V, (B, T), generator=made)
    labels[0, 3:] = labels[1, 0] = -100
    return pair[0], pair[1], hidden[0], hidden[1], labels


def loss_of(objective, student, teacher, student_hidden, teacher_hidden, labels):
    """(loss, gradients by name) of one micro-batch that is the whole step."""
    reading = reads(objective, READS)
    model = Stub(student, student_hidden)
    given = {"teacher": teacher, "teacher_hidden": tuple(teacher_hidden)}
    step = language_step(objective, reading, lambda inputs: {name: given[name] for name in given if name in reading})
    loss, keep = step(model, {"input_ids": labels.clamp(min=0), "labels": labels}, 0.5)
    total = kept_mean(loss, keep, (labels != -100).sum())
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_masked_positions_change_nothing(objective):
    student, teacher, student_hidden, teacher_hidden, labels = tensors()
    loss, gradient = loss_of(objective, student, teacher, student_hidden, teacher_hidden, labels)
    masked = labels == -100
    placed = {"keep", "student_hidden", "teacher_hidden"} & set(reads(objective, READS))  # the loop cannot drop positions for these
    for rubbish in (1e4, -1e4) if placed else (1e4, float("inf"), -float("inf"), float("nan")):
        other = [x.masked_fill(masked[..., None], rubbish) for x in (student, teacher)]
        again, gradient_again = loss_of(objective, *other, student_hidden, teacher_hidden, labels)
        assert torch.equal(loss, again)
        for name, value in gradient.items():
            assert torch.equal(value, gradient_again[name])
            assert not value[masked].any()


def test_gradient_is_finite_and_not_zero(objective):
    for scale in (1e-3, 1.0, 30.0, 1e4):
        loss, gradient = loss_of(objective, *tensors(scale=scale))
        assert torch.isfinite(loss)
        assert gradient
        assert all(torch.isfinite(value).all() for value in gradient.values())
        if scale == 1.0:
            assert any(value.any() for value in gradient.values())


def test_zero_at_the_teacher_where_it_says_so(objective):
    reading = reads(objective, READS)
    if not ({"teacher", "teacher_hidden"} & set(reading)):
        assert not inspect.getattr_static(type(objective), "zero_at_teacher", False)
        return
    student, _, hidden, _, labels = tensors(dtype=torch.float64)
    loss, gradient = loss_of(objective, student, student, hidden, hidden, labels)
    says = inspect.getattr_static(type(objective), "zero_at_teacher")
    assert (abs(loss) < 1e-12 and all(value.abs().max() < 1e-12 for value in gradient.values())) is says


def test_any_leading_shape(objective):
    reading = reads(objective, READS)
    if {"keep", "student_hidden", "teacher_hidden"} & set(reading):
        return
    student, teacher, *_, labels = tensors()
    have = {"student": student, "teacher": teacher, "labels": labels.clamp(min=0), "progress": 0.5}
    whole = objective(**{name: have[name] for name in reading})
    assert whole.shape == labels.shape
    flat = {name: value.flatten(0, 1) if isinstance(value, torch.Tensor) else value for name, value in have.items()}
    torch.testing.assert_close(objective(**{name: flat[name] for name in reading}).view(B, T), whole)
    for i in range(B):
        for t in range(T):
            one = {name: value[i, t] if isinstance(value, torch.Tensor) else value for name, value in have.items()}
            torch.testing.assert_close(objective(**{name: one[name] for name in reading}), whole[i, t])


def test_one_loss_per_position_in_at_least_float32(objective):
    reading = reads(objective, READS)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        student, teacher, student_hidden, teacher_hidden, labels = tensors(dtype=dtype)
        have = {"student": student, "teacher": teacher, "labels": labels.clamp(min=0), "keep": labels != -100, "progress": 0.5}
        have |= {"student_hidden": tuple(student_hidden), "teacher_hidden": tuple(teacher_hidden)}
        loss = objective(**{name: have[name] for name in reading})
        assert loss.shape == labels.shape
        assert loss.dtype == expected


def test_inputs_are_left_as_they_were_and_the_teacher_learns_nothing(objective):
    reading = reads(objective, READS)
    student, teacher, student_hidden, teacher_hidden, labels = tensors()
    have = {"student": student.requires_grad_(), "teacher": teacher.requires_grad_(), "labels": labels.clamp(min=0)}
    have |= {"keep": labels != -100, "progress": 0.5, "student_hidden": tuple(student_hidden), "teacher_hidden": tuple(teacher_hidden)}
    before = student.detach().clone(), teacher.detach().clone()
    loss = objective(**{name: have[name] for name in reading})
    if loss.requires_grad:
        loss.sum().backward()
    assert torch.equal(student, before[0])
    assert torch.equal(teacher, before[1])
    assert teacher.grad is None or not teacher.grad.any()
