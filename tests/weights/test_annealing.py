from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from smelt.spec import SmeltError
from smelt.weights._annealing import annealed, energy, exhaustive, swapped

SOLVERS = [swapped, annealed, exhaustive]


def problem(size, seed, ones=None):
    draw = torch.Generator().manual_seed(seed)
    q = torch.randn(size, size, generator=draw, dtype=torch.float64)
    x = torch.zeros(size, dtype=torch.bool)
    x[torch.randperm(size, generator=draw)[: size // 2 if ones is None else ones]] = True
    return q, x, draw


def slow(q, x):
    return sum(float(q[i, j]) for i in range(len(x)) for j in range(len(x)) if x[i] and x[j])


def masks(size, ones):
    for chosen in itertools.combinations(range(size), ones):
        x = torch.zeros(size, dtype=torch.bool)
        x[list(chosen)] = True
        yield x


def test_energy_is_the_sum_over_pairs_of_ones():
    q, _, _ = problem(5, 0)
    every = torch.tensor(list(itertools.product([False, True], repeat=5)))
    assert_close(energy(q, every), torch.tensor([slow(q, x) for x in every], dtype=torch.float64))


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("seed", range(4))
def test_the_number_of_ones_is_kept_and_the_energy_never_rises(solve, seed):
    for ones in (1, 4, 9):
        q, x, draw = problem(10, seed, ones)
        before = x.clone()
        found = solve(q, x, draw)
        assert torch.equal(x, before) and found.dtype == torch.bool
        assert int(found.sum()) == ones and energy(q, found) <= energy(q, x)


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("size, ones", [(0, 0), (1, 0), (1, 1), (4, 0), (4, 4)])
def test_where_there_is_nothing_to_choose(solve, size, ones):
    q, x, draw = problem(size, 0, ones)
    assert torch.equal(solve(q, x, draw), x)


@pytest.mark.parametrize("solve", SOLVERS)
def test_equal_energies_stay_as_they_are(solve):
    _, x, draw = problem(8, 1)
    assert torch.equal(solve(torch.zeros(8, 8, dtype=torch.float64), x, draw), x)


@pytest.mark.parametrize("size, seed", [(7, 0), (9, 1), (9, 2), (10, 3)])
def test_exhaustive_finds_the_minimum_by_brute_force(size, seed):
    q, x, _ = problem(size, seed)
    assert slow(q, exhaustive(q, x)) == pytest.approx(min(slow(q, m) for m in masks(size, size // 2)), abs=1e-10)


@pytest.mark.parametrize("seed", range(6))
def test_annealing_finds_the_minimum_of_small_problems(seed):
    q, x, draw = problem(10 + seed % 3 * 3, seed)  # 10, 13, 16 variables
    assert_close(energy(q, annealed(q, x, draw)), energy(q, exhaustive(q, x)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_swapping_takes_the_best_swap_each_time_and_ends_where_none_gains(seed):
    q, x, _ = problem(9, seed)
    want = x.clone()
    while True:
        best = (slow(q, want) - 1e-9, None)
        for off in want.nonzero()[:, 0].tolist():
            for on in (~want).nonzero()[:, 0].tolist():
                other = want.clone()
                other[off], other[on] = False, True
                best = min(best, (slow(q, other), (off, on)), key=lambda pair: pair[0])
        if best[1] is None:
            break
        want[best[1][0]], want[best[1][1]] = False, True
    assert torch.equal(swapped(q, x), want)


def test_negative_couplings_count():
    """The only gain is a coupling below zero: a solver that drops negative entries leaves the mask alone."""
    q = torch.zeros(6, 6, dtype=torch.float64)
    q[3, 4] = -1e-13
    x = torch.tensor([True, True, False, False, False, False])
    want = torch.tensor([False, False, False, True, True, False])
    assert torch.equal(exhaustive(q, x), want)
    assert torch.equal(annealed(q, x, torch.Generator().manual_seed(0)), want)


def test_annealing_repeats_with_its_draw():
    q, x, _ = problem(40, 5)
    first, second = (annealed(q, x, torch.Generator().manual_seed(3), restarts=3) for _ in range(2))
    assert torch.equal(first, second) and energy(q, first) <= energy(q, x)


def test_too_many_masks_are_refused():
    with pytest.raises(SmeltError, match="block=20"):
        exhaustive(*problem(21, 0)[:2])
