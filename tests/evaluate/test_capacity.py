from __future__ import annotations

import math

import numpy as np
import pytest

from smelt.evaluate._capacity import optimum
from smelt.spec import SmeltError

SIZES = [1.0, 2.0, 4.0, 8.0, 16.0]


def curve(best, bend=0.02, noise=0.0, seed=0, seeds=3):
    draw = np.random.default_rng(seed)
    return [[2 + bend * (math.log(s) - math.log(best)) ** 2 + noise * draw.normal() for _ in range(seeds)] for s in SIZES]


@pytest.mark.parametrize("best", [2.0, 2.5, 5.0, 9.0])
def test_a_parabola_gives_its_lowest_point(best):
    found = optimum(SIZES, curve(best))
    assert found.size == found.best == pytest.approx(best, rel=1e-9)
    assert found.low == pytest.approx(best, rel=1e-6) and found.high == pytest.approx(best, rel=1e-6)


def test_a_planted_optimum_is_found_within_a_step_of_the_grid():
    inside = 0
    for seed in range(40):
        found = optimum(SIZES, curve(4.0, noise=0.003, seed=seed), draws=400)
        assert found.size is not None and 2 < found.size < 8
        assert found.low <= found.best <= found.high
        inside += found.low <= 4.0 <= found.high
    assert inside >= 33  # an interval of 95 % that is somewhat too narrow for fifteen figures


@pytest.mark.parametrize("slope", [-0.05, 0.05])
@pytest.mark.parametrize("bend", [0.0, 0.004, -0.004])
def test_monotone_losses_have_no_interior_optimum(slope, bend):
    for seed in range(10):
        draw = np.random.default_rng(seed)
        losses = [[2 + slope * math.log(s) + bend * math.log(s) ** 2 + 0.002 * draw.normal() for _ in range(3)] for s in SIZES]
        found = optimum(SIZES, losses, draws=300)
        assert found.size is None
        assert found.best == pytest.approx(16.0 if slope < 0 else 1.0)


def test_a_hill_has_its_best_at_an_end():
    found = optimum(SIZES, curve(3.0, bend=-0.02))
    assert found.size is None and found.best == pytest.approx(16.0)


def test_units_of_size_do_not_matter_and_seeds_may_differ_in_number():
    losses = curve(4.0, noise=0.003)
    losses[1] = losses[1][:1]
    a, b = optimum(SIZES, losses), optimum([1e6 * s for s in SIZES], losses)
    assert b.size == pytest.approx(1e6 * a.size) and b.low == pytest.approx(1e6 * a.low)
    x = np.log(np.repeat(SIZES, [len(row) for row in losses]))
    c2, c1, _ = np.polyfit(x, np.concatenate(losses), 2)
    assert a.best == pytest.approx(math.exp(-c1 / (2 * c2)))


@pytest.mark.parametrize("sizes, losses", [([1, 2, 4], [[1.0]] * 3), ([1, 2, 4, 4], [[1.0]] * 4), ([0, 2, 4, 8], [[1.0]] * 4)])
def test_what_cannot_be_fitted_is_refused(sizes, losses):
    with np.errstate(divide="ignore"), pytest.raises(SmeltError, match="four different"):
        optimum(sizes, losses)
