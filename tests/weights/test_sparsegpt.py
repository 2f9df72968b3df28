from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights._hessian import output_error
from smelt.weights.magnitude import Magnitude
from smelt.weights.sparsegpt import SparseGPT


def problem(out, columns, seed=0):
    """A weight and the Hessian of correlated inputs of unequal size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw, dtype=torch.float64) * torch.rand(columns, generator=draw, dtype=torch.float64)
    x = torch.randn(2 * columns, columns, generator=draw, dtype=torch.float64) @ mix
    return torch.randn(out, columns, generator=draw), x.mT @ x / len(x)


def slow(weight, hessian, sparsity=0.5, n=0, m=0, damp=0.01, block=128):
    """Optimal brain surgeon: one column at a time in float64, with the inverse of what is left of H computed anew."""
    work, columns = weight.double().clone(), weight.shape[1]
    damped = hessian + damp * hessian.diagonal().mean() * torch.eye(columns)
    mask = torch.zeros_like(work, dtype=torch.bool)
    first = [torch.linalg.inv(damped[j:, j:])[0, 0].item() for j in range(columns)]
    done = 0
    for j in range(columns):
        if m and j % m == 0:
            for row in range(len(work)):
                group = sorted(range(j, j + m), key=lambda k: work[row, k].item() ** 2 / first[k])
                mask[row, group[: m - n]] = True
        if not m and j % block == 0:
            stop = min(j + block, columns)
            score = {(i, k): work[i, k].item() ** 2 / first[k] for i in range(len(work)) for k in range(j, stop)}
            goal = round(sparsity * len(work) * stop)
            for i, k in sorted(score, key=score.get)[: goal - done]:
                mask[i, k] = True
            done = goal
        inverse = torch.linalg.inv(damped[j:, j:])
        for row in range(len(work)):
            if mask[row, j]:
                work[row, j:] -= work[row, j] / inverse[0, 0] * inverse[0]
                work[row, j] = 0.0
    return work


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.29, "damp": 0.1}, {"n": 2, "m": 4}, {"n": 1, "m": 5}])
def test_equals_the_textbook(settings):
    weight, hessian = problem(6, 140)
    method = SparseGPT(**settings)
    result = method(weight, hessian)
    assert_close(result.double(), slow(weight, hessian, **settings), rtol=0, atol=1e-5)
    assert int((result == 0).sum()) == method.budget([(6, 140)])[0].zeros
    if method.m:
        assert ((result != 0).unflatten(1, (-1, method.m)).sum(2) == method.n).all()


def test_uncorrelated_inputs_give_block_magnitude_and_no_update():
    weight = torch.randn(16, 300)
    made = SparseGPT(0.5)(weight, 3.0 * torch.eye(300, dtype=torch.float64))
    blocks = [Magnitude(0.5, over="matrix")(part) for part in weight.split(128, dim=1)]
    assert torch.equal(made, torch.cat(blocks, dim=1))


@pytest.mark.parametrize("settings", [{"sparsity": 0.5}, {"sparsity": 0.8}, {"n": 2, "m": 4}])
def test_better_than_its_own_mask_without_update(settings):
    for seed in range(3):
        weight, hessian = problem(24, 160, seed)
        made = SparseGPT(**settings)(weight, hessian)
        masked = weight.masked_fill(made == 0, 0.0)
        assert output_error(weight, made, hessian) < output_error(weight, masked, hessian)


@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.5, 0.987])
@pytest.mark.parametrize("shape", [(1, 1), (3, 129), (7, 500)])
def test_budget_is_exact_over_blocks(sparsity, shape):
    weight, hessian = problem(*shape)
    method = SparseGPT(sparsity)
    assert int((method(weight, hessian) == 0).sum()) == method.budget([shape])[0].zeros == round(sparsity * shape[0] * shape[1])


def test_inputs_that_never_come_go_first_and_no_others_are_lost():
    weight, hessian = problem(5, 20)
    hessian[[2, 17]] = 0
    hessian[:, [2, 17]] = 0
    made = SparseGPT(0.1)(weight, hessian)
    assert torch.equal(made == 0, torch.zeros(5, 20).index_fill(1, torch.tensor([2, 17]), 1).bool())
    assert torch.equal(made, weight.masked_fill(made == 0, 0.0)), "their error costs nothing"


def test_fewer_tokens_than_columns_are_enough():
    x = torch.randn(10, 64, dtype=torch.float64)
    assert torch.isfinite(SparseGPT()(torch.randn(4, 64), x.mT @ x)).all()


def test_settings_that_contradict_each_other():
    with pytest.raises(SmeltError, match="sparsegpt: n=0 and m=4"):
        parse("sparsegpt(m=4)", "weights")
    with pytest.raises(SmeltError, match="sparsegpt: m=4 does not divide the 6 columns"):
        SparseGPT(n=2, m=4)(torch.randn(2, 6), torch.eye(6).double())
    with pytest.raises(SmeltError, match="damp"):
        parse("sparsegpt(damp=0.0)", "weights")
