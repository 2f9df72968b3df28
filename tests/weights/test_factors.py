from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.weights._factors import factors, rank_within, root


def problem(out, columns, tokens=200, seed=0):
    """A weight and the second moments of correlated inputs of unequal size, in float64."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64) * torch.rand(columns, generator=draw, dtype=torch.float64)
    x = torch.randn(tokens, columns, generator=draw, dtype=torch.float64) @ mix
    return torch.randn(out, columns, generator=draw, dtype=torch.float64), x.mT @ x / tokens


@pytest.mark.parametrize("power", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("damp", [0.0, 0.1])
def test_root_times_its_transpose_is_the_power_of_the_moments(power, damp):
    _, second = problem(3, 9)
    by = root(second, power, damp)
    values, vectors = torch.linalg.eigh(second + damp * second.diagonal().mean() * torch.eye(9))
    assert_close(by @ by.mT, vectors @ values.pow(power).diag() @ vectors.mT)


@pytest.mark.parametrize("tokens", [200, 5])  # 5: inputs that span a part of the space, and no inverse exists
@pytest.mark.parametrize("out, columns", [(7, 12), (12, 7), (9, 9)])
def test_error_is_the_dropped_singular_values(out, columns, tokens):
    weight, second = problem(out, columns, tokens)
    by = root(second, 1.0, 0.0)
    singular = torch.linalg.svdvals(weight @ by)
    for rank in range(1 + min(out, columns)):
        up, down = factors(weight, rank, by)
        off = weight - up @ down
        assert up.shape == (out, rank) and down.shape == (rank, columns)
        assert_close((off @ second * off).sum(), singular[rank:].square().sum(), rtol=1e-9, atol=1e-12 * singular[0].item() ** 2)


@pytest.mark.parametrize("out, columns", [(7, 12), (12, 7)])
def test_equals_the_truncated_decomposition_with_the_root_taken_off(out, columns):
    weight, second = problem(out, columns)
    lower = torch.linalg.cholesky(second)  # any root will do
    u, s, v = torch.linalg.svd(weight @ lower, full_matrices=False)
    for by in (lower, root(second, 1.0, 0.0)):
        up, down = factors(weight, 4, by)
        assert_close(up @ down, u[:, :4] * s[:4] @ v[:4] @ torch.linalg.inv(lower), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("out, columns", [(7, 12), (12, 7)])
def test_without_a_root_it_is_the_plain_decomposition(out, columns):
    weight, _ = problem(out, columns)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    up, down = factors(weight, 3)
    assert_close(up @ down, u[:, :3] * s[:3] @ v[:3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out, columns", [(7, 12), (12, 7)])
def test_full_rank_is_the_matrix_in_its_dtype(out, columns, dtype):
    weight, second = problem(out, columns)
    weight = weight.to(dtype)
    up, down = factors(weight, min(out, columns), root(second, 1.0, 1e-4))
    assert up.dtype == down.dtype == dtype
    assert (up.double() @ down.double() - weight.double()).norm() < 4 * torch.finfo(dtype).eps * weight.double().norm()


def test_zeros_stay_zero():
    up, down = factors(torch.zeros(4, 6), 2, torch.zeros(6, 6, dtype=torch.float64))
    assert torch.isfinite(up).all() and not down.any()


def test_rank_is_the_largest_that_fits():
    for numbers in (0, 15, 16, 100, 1000.5):
        rank = rank_within(numbers, 6, 10)
        assert rank == max(r for r in range(7) if 16 * r <= numbers)
