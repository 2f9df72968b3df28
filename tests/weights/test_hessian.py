from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.spec import SmeltError
from smelt.weights._hessian import check_pattern, corrected, inverse_factor, lowest_of_groups, output_error, pattern_zeros


def inputs(columns=20, count=50, seed=0):
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=draw, dtype=torch.float64)
    return torch.randn(count, columns, generator=draw, dtype=torch.float64) @ mixed


def test_error_is_that_of_the_outputs():
    x, weight, made = inputs(), torch.randn(4, 20), torch.randn(4, 20)
    slow = sum(((weight.double() - made.double()) @ row).square().sum() for row in x) / len(x)
    assert_close(output_error(weight, made, x.mT @ x / len(x)), slow)


@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_factor_is_that_of_the_inverse(damp):
    x = inputs()
    x[:, 3] = 0
    hessian = x.mT @ x / len(x)
    before = hessian.clone()
    factor, dead = inverse_factor(hessian, damp, "test")
    assert torch.equal(hessian, before) and dead.nonzero().flatten().tolist() == [3]
    full = hessian.clone()
    full[3, 3] = 1.0
    full += damp * full.diagonal().mean() * torch.eye(20)
    assert_close(factor.mT @ factor, torch.linalg.inv(full))
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()


def test_a_multiple_of_the_identity_has_no_side_effects():
    factor, _ = inverse_factor(3.0 * torch.eye(9, dtype=torch.float64), 0.01, "test")
    assert torch.equal(factor, factor.diagonal().diag())


def test_too_little_damping_is_named():
    row = torch.randn(1, 8, dtype=torch.float64)
    with pytest.raises(SmeltError, match=r"test: the inputs span fewer than the 8 columns, so damp=0\.0 is too small"):
        inverse_factor(-row.mT @ row + torch.eye(8), 0.0, "test")


def textbook(weight, hessian, rewrite):
    """Optimal brain surgeon, as in the books: the inverse of what is left of H, anew for every column."""
    work = weight.double().clone()
    for j in range(work.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        for row in work:
            wanted = rewrite(row[j].item())
            row[j:] -= (row[j] - wanted) / inverse[0, 0] * inverse[0]
            row[j] = wanted
    return work


@pytest.mark.parametrize("block", [1, 3, 20, 128])
def test_equals_the_textbook_whatever_the_block(block):
    x, weight = inputs(), torch.randn(5, 20, dtype=torch.float64)
    hessian = x.mT @ x / len(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(20)
    factor, _ = inverse_factor(hessian, 0.01, "test")
    made = corrected(weight, factor, lambda j, rest: rest[:, 0].round(), block)
    assert_close(made, textbook(weight, damped, round), rtol=0, atol=1e-9)


def test_nothing_rewritten_is_nothing_changed():
    weight = torch.randn(5, 20)
    factor, _ = inverse_factor(inputs().mT @ inputs(), 0.01, "test")
    assert torch.equal(corrected(weight, factor, lambda j, rest: rest[:, 0], 7), weight.double())


def test_what_a_column_is_given_is_up_to_date_to_the_end_of_its_block():
    x, weight = inputs(), torch.randn(5, 20, dtype=torch.float64)
    factor, _ = inverse_factor(x.mT @ x, 0.01, "test")
    given = {block: [] for block in (4, 20)}
    for block, seen in given.items():
        corrected(weight, factor, lambda j, rest, seen=seen: (seen.append(rest.clone()), rest[:, 0].round())[1], block)
    for j, (some, whole) in enumerate(zip(given[4], given[20], strict=True)):
        upto = 20 if j % 4 == 0 else 4 - j % 4
        assert_close(some[:, :upto], whole[:, :upto])


@pytest.mark.parametrize("n, m", [(2, 4), (1, 2), (5, 8), (4, 4)])
def test_patterns(n, m):
    score = torch.rand(3, 16)
    mask = lowest_of_groups(score, n, m)
    assert (mask.unflatten(1, (-1, m)).sum(2) == m - n).all() and pattern_zeros("test", n, m, 16) == mask[0].sum()
    for row, gone in zip(score.unflatten(1, (-1, m)).flatten(0, 1), mask.unflatten(1, (-1, m)).flatten(0, 1), strict=True):
        assert not gone.any() or gone.all() or row[gone].max() < row[~gone].min()
    assert lowest_of_groups(torch.zeros(1, m), n, m)[0, : m - n].all(), "of equals the first"


def test_contradictions_are_named():
    for n, m in ((2, 0), (0, 4), (5, 4)):
        with pytest.raises(SmeltError, match=f"test: n={n} and m={m}; n of every m"):
            check_pattern("test", n, m, 0.5)
    with pytest.raises(SmeltError, match=r"n=1 of m=4 leaves sparsity=0\.75, not 0\.3"):
        check_pattern("test", 1, 4, 0.3)
    check_pattern("test", 1, 4, 0.75)
    with pytest.raises(SmeltError, match="m=8 does not divide the 20 columns of a matrix; the nearest below that does is m=5"):
        pattern_zeros("test", 4, 8, 20)
