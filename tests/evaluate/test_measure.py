from __future__ import annotations

import math
import random
import statistics
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._measure import _tail, measure, ratio
from smelt.progress import Track
from smelt.spec import SmeltError

EVENTS: list[str] = []


@pytest.fixture(autouse=True)
def _fresh():
    EVENTS.clear()


@dataclass(frozen=True)
class Quality(Probe):
    @classmethod
    def example(cls):
        return cls()

    def __call__(self, variant):
        EVENTS.append(f"quality {variant.name}")
        return [Metric("q", 1.0, "u", "lower", (2.0,), (2.0,))]


@dataclass(frozen=True)
class Timed(Probe):
    paired: ClassVar[bool] = True

    @classmethod
    def example(cls):
        return cls()

    def __call__(self, variant):
        EVENTS.append(f"timed {variant.name}")
        return [Metric("t", float(len(EVENTS)), "s", "lower"), Metric("n", 3.0, "u", "higher")]


def factory(name):
    @contextmanager
    def enter():
        EVENTS.append(f"in {name}")
        yield Variant(name, None, None)
        EVENTS.append(f"out {name}")

    return enter


def test_quality_goes_variant_by_variant_and_times_go_in_turns():
    found = measure([factory("a"), factory("b")], [Timed(), Quality(), Quality()], rounds=2, warmup=1)
    assert EVENTS[:8] == ["in a", "quality a", "quality a", "out a", "in b", "quality b", "quality b", "out b"]
    assert EVENTS[8:] == [f"{w} {n}" for n in "abbaab" for w in ("in", "timed", "out")]
    assert list(found) == ["a", "b"]
    assert [m.name for m in found["a"]] == ["t", "n", "q", "q"]
    times = {n: [i + 1.0 for i, e in enumerate(EVENTS) if e == f"timed {n}"] for n in "ab"}
    for name in "ab":
        timed, count, quality, _ = found[name]
        assert list(timed.samples) == times[name][1:]  # the first was the warm-up
        assert timed.value == statistics.median(timed.samples) and timed.weights == ()
        assert count.samples == (3.0, 3.0) and quality == Metric("q", 1.0, "u", "lower", (2.0,), (2.0,))


def test_the_bar_is_filled_and_names_must_differ():
    bar = Track("x", 10.0, "probes", _next=math.inf)
    measure([factory("a"), factory("b"), factory("c")], [Timed(), Quality()], rounds=3, warmup=2, progress=bar)
    assert bar.done == pytest.approx(10.0)
    with pytest.raises(SmeltError, match="two variants are called 'a'"):
        measure([factory("a"), factory("a")], [Quality()])
    assert measure([], [Quality(), Timed()]) == {}


def sums(samples, weights):
    return Metric("m", sum(samples) / sum(weights), "u", "lower", tuple(samples), tuple(weights))


def rounds(samples):
    return Metric("m", statistics.median(samples), "s", "lower", tuple(samples))


def test_the_middle_is_the_ratio_of_sums_or_the_median_of_ratios():
    a, b = sums([1, 2, 6], [2, 2, 4]), sums([3, 3, 3], [2, 2, 4])
    assert ratio(a, b)[0] == pytest.approx(a.value / b.value)
    assert ratio(rounds([2, 9, 8]), rounds([1, 3, 8]))[0] == 2.0
    assert ratio(rounds([2, 9, 8, 5]), rounds([1, 3, 8, 5]))[0] == pytest.approx(math.sqrt(2 * 1))
    middle, low, high = ratio(rounds([-1, 0.5]), rounds([1, 1]))  # slopes fitted to noise: no geometric mean
    assert (middle, low, high) == (-0.25, -1.0, 0.5)
    plain = ratio(Metric("m", 3.0, "u", "lower"), Metric("m", 2.0, "u", "lower"))
    assert plain == (1.5, 1.5, 1.5)


def test_equals_a_slow_bootstrap():
    generator = np.random.default_rng(5)
    x, y, w = generator.uniform(1, 2, 6), generator.uniform(1, 2, 6), generator.uniform(1, 3, 6)
    drawn = np.random.default_rng(3).integers(6, size=(500, 6))
    by_sums, by_rounds = [], []
    for row in drawn.tolist():
        by_sums.append((sum(x[i] for i in row) / sum(w[i] for i in row)) / (sum(y[i] for i in row) / sum(w[i] for i in row)))
        middle = sorted(x[i] / y[i] for i in row)[2:4]
        by_rounds.append(math.sqrt(middle[0] * middle[1]))
    skip = int(_tail(6) * 500)
    for a, b, values in ((sums(x, w), sums(y, w), by_sums), (rounds(x), rounds(y), by_rounds)):
        assert ratio(a, b, seed=3, draws=500)[1:] == pytest.approx((sorted(values)[skip], sorted(values)[-1 - skip]))


@pytest.mark.parametrize("count", [3, 6, 7, 20])
@pytest.mark.parametrize("make", [lambda x: rounds(x), lambda x: sums(x, [1.0 + i % 3 for i in range(len(x))])])
def test_swapping_inverts_the_ratio_and_its_interval(count, make):
    generator = np.random.default_rng(count)
    a, b = make(generator.uniform(1, 3, count).tolist()), make(generator.uniform(1, 2, count).tolist())
    middle, low, high = ratio(a, b)
    assert low <= middle <= high and low < high
    assert ratio(b, a) == pytest.approx((1 / middle, 1 / high, 1 / low), rel=1e-12)
    assert ratio(a, b) == (middle, low, high)


def coverage(make, truth):
    inside = 0
    for repetition in range(200):
        a, b = make(np.random.default_rng(repetition))
        _, low, high = ratio(a, b, seed=repetition, draws=1000)
        inside += low <= truth <= high
    return inside / 200


@pytest.mark.parametrize("count", [7, 15, 40])
def test_interval_of_times_covers_the_true_ratio(count):
    """Rounds share a slow drift (a busy machine) and have noise of their own with a heavy right tail."""

    def make(generator):
        drift = np.exp(generator.normal(0, 0.3, count))
        noise = np.exp(generator.normal(0, 0.1, (2, count)) + generator.choice([0, 0.5], (2, count), p=[0.9, 0.1]))
        return rounds((1.7 * drift * noise[0]).tolist()), rounds((drift * noise[1]).tolist())

    assert 0.88 <= coverage(make, 1.7) <= 0.995


@pytest.mark.parametrize("count", [8, 16, 60])
def test_interval_of_sums_covers_the_true_ratio(count):
    """Documents of different size and difficulty; bits per byte of a is 1.2 times that of b in expectation."""

    def make(generator):
        size = generator.integers(500, 5000, count).astype(float)
        hard = generator.gamma(8, 1 / 8, count)
        a, b = (size * hard * factor * np.exp(generator.normal(-0.005, 0.1, count)) for factor in (1.2, 1.0))
        return sums(a.tolist(), size.tolist()), sums(b.tolist(), size.tolist())

    assert 0.88 <= coverage(make, 1.2) <= 0.99


def test_pairing_makes_the_interval_narrow():
    generator = np.random.default_rng(0)
    drift = np.exp(generator.normal(0, 1, 30))
    a, b = (2 * drift * generator.uniform(0.99, 1.01, 30)).tolist(), drift.tolist()
    _, low, high = ratio(rounds(a), rounds(b))
    assert 1.97 < low < high < 2.03
    _, wide_low, wide_high = ratio(rounds(random.Random(0).sample(a, 30)), rounds(b))
    assert wide_high / wide_low > 1.5


def test_zeros_are_equal_or_infinite():
    zero, one = sums([0.0, 0.0], [1, 1]), sums([1.0, 2.0], [1, 1])
    assert ratio(zero, zero) == (1.0, 1.0, 1.0)
    assert ratio(zero, one) == (0.0, 0.0, 0.0)
    assert ratio(one, zero) == (math.inf, math.inf, math.inf)
    assert ratio(Metric("m", 0.0, "u", "lower"), Metric("m", 0.0, "u", "lower")) == (1.0, 1.0, 1.0)


def test_parts_that_cannot_be_paired_are_refused():
    with pytest.raises(SmeltError, match="cannot be paired"):
        ratio(rounds([1.0, 2.0]), rounds([1.0]))
    with pytest.raises(SmeltError, match="cannot be paired"):
        ratio(sums([1.0], [1.0]), rounds([1.0]))


@pytest.mark.parametrize("count", [3, 5, 7, 16, 200])
def test_the_level_is_that_of_the_t_distribution(count):
    stats = pytest.importorskip("scipy.stats")
    exact = stats.norm.cdf(-math.sqrt(count / (count - 1)) * stats.t.ppf(0.975, count - 1))
    assert _tail(count) == pytest.approx(exact, rel=0.02 if count > 5 else 0.6, abs=1e-6)
