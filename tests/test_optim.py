"""Muon against a loop over matrices, its AdamW against torch's, and going on after a save."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from smelt.optim import Muon, orthogonalize

SHAPES = [(8, 8), (16, 8), (8, 16), (8, 16), (16, 8), (64, 3), (1, 5)]


def parameters(seed=0, dtype=torch.float64):
    made = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(shape, generator=made, dtype=dtype).requires_grad_() for shape in SHAPES]
    others = [torch.randn(shape, generator=made, dtype=dtype).requires_grad_() for shape in [(10, 4), (4,), (), (3, 2, 2)]]
    return matrices, others


def fill(tensors, seed):
    made = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=made, dtype=tensor.dtype)


# orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (64, 32), (32, 64), (128, 16), (5, 16, 48), (2, 3, 24, 8)])
def test_singular_values_come_near_one_and_singular_vectors_stay(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalize(matrix)
    after = u.mT @ found @ v.mT  # diagonal: the same vectors
    values = after.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(after, torch.diag_embed(values), rtol=0, atol=1e-9)
    strong = s / matrix.norm(dim=(-2, -1), keepdim=True)[..., 0] > 0.01  # five steps do not lift values below about 0.01
    assert strong.double().mean() > 0.9
    assert values[strong].min() > 0.6 and values.max() < 1.25


def test_each_singular_value_follows_the_polynomial():
    """s <- a s + b s^3 + c s^5, five times, from s / |M|."""
    matrix = torch.randn(20, 12, dtype=torch.float64)
    s = torch.linalg.svdvals(matrix)
    s = s / s.norm()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(torch.linalg.svdvals(orthogonalize(matrix)), s.sort(descending=True).values, rtol=1e-5, atol=1e-7)


def test_a_batch_equals_one_by_one_and_a_transpose_the_transpose():
    batch = torch.randn(6, 12, 20, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(batch), torch.stack([orthogonalize(m) for m in batch]), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(orthogonalize(batch.mT), orthogonalize(batch).mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(orthogonalize(batch * 1e3), orthogonalize(batch), rtol=1e-6, atol=1e-6)


def test_zero_stays_zero():
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))


# Muon


def test_matrices_follow_the_equation_in_the_docstring():
    matrices, _ = parameters()
    lr, decay, momentum = 0.03, 0.1, 0.9
    optimizer = Muon(matrices, [], lr, decay, momentum)
    expected = [p.detach().clone() for p in matrices]
    buffers = [torch.zeros_like(p) for p in matrices]
    for step in range(4):
        fill(matrices, step)
        for w, b, p in zip(expected, buffers, matrices, strict=True):
            b.copy_(momentum * b + p.grad)
            update = 0.2 * math.sqrt(max(p.shape)) * orthogonalize(momentum * b + p.grad)
            w.copy_((1 - lr * decay) * w - lr * update)
        optimizer.step()
        for w, p in zip(expected, matrices, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=1e-12, atol=1e-12)


def test_the_rest_follows_torch_adamw_step_for_step():
    _, others = parameters()
    copies = [p.detach().clone().requires_grad_() for p in others]
    lr, decay = 0.01, 0.1
    optimizer = Muon([], others, lr, decay)
    groups = [
        {"params": [p for p in copies if p.dim() > 1], "weight_decay": decay},
        {"params": [p for p in copies if p.dim() <= 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    for step in range(20):
        fill(others, step)
        fill(copies, step)
        if step == 7:  # a step in which one of them had no gradient
            others[0].grad = copies[0].grad = None
        optimizer.step()
        reference.step()
        for p, q in zip(others, copies, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_a_small_problem_is_solved():
    torch.manual_seed(1)
    target = torch.randn(12, 12)
    weight, bias = torch.zeros(12, 12, requires_grad=True), torch.zeros(12, requires_grad=True)
    optimizer = Muon([weight], [bias], lr=0.1, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: max(0.0, 1 - at / 200))
    losses = []
    for _ in range(200):
        x = torch.randn(64, 12)
        loss = ((x @ weight.mT + bias - x @ target.mT - 1) ** 2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    assert sum(losses[-10:]) < 0.01 * sum(losses[:10])


def test_a_schedule_sets_the_rate_of_every_group():
    matrices, others = parameters()
    optimizer = Muon(matrices, others, 0.2, 0.1)
    assert len(optimizer.param_groups) == 3
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 1 / (1 + at))
    for at in range(1, 5):
        fill([*matrices, *others], at)
        optimizer.step()
        schedule.step()
        assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.2 / (1 + at)] * 3)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for p in [*matrices, *others]]
    fill([*matrices, *others], 9)
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip([*matrices, *others], before, strict=True))


@pytest.mark.parametrize("through_file", [False, True])
def test_going_on_from_its_state_is_bitwise_the_same(tmp_path, through_file):
    def run(optimizer, tensors, steps):
        for step in steps:
            fill(tensors, step)
            optimizer.step()

    matrices, others = parameters(dtype=torch.float32)
    optimizer = Muon(matrices, others, 0.02, 0.1)
    run(optimizer, [*matrices, *others], range(5))
    weights, state = [p.detach().clone() for p in [*matrices, *others]], copy.deepcopy(optimizer.state_dict())
    if through_file:
        torch.save(state, tmp_path / "optimizer.pt")
        state = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    run(optimizer, [*matrices, *others], range(5, 10))

    again, rest = parameters(seed=1, dtype=torch.float32)
    with torch.no_grad():
        for p, w in zip([*again, *rest], weights, strict=True):
            p.copy_(w)
    second = Muon(again, rest, 0.02, 0.1)
    second.load_state_dict(state)
    run(second, [*again, *rest], range(5, 10))
    assert all(torch.equal(p, q) for p, q in zip([*matrices, *others], [*again, *rest], strict=True))


def test_state_takes_one_tensor_for_a_matrix_and_two_for_the_rest():
    matrices, others = parameters()
    optimizer = Muon(matrices, others, 0.02, 0.1)
    fill([*matrices, *others], 0)
    optimizer.step()
    held = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.dim())
    scalars = [p for p in others if p.dim() == 0]
    assert held == sum(p.numel() for p in matrices) + 2 * sum(p.numel() for p in others) - 2 * len(scalars)


def test_a_closure_is_called_with_gradients():
    weight = torch.randn(4, 4, requires_grad=True)
    optimizer = Muon([weight], [], 0.1, 0.0)

    def closure():
        loss = (weight**2).sum()
        optimizer.zero_grad()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
