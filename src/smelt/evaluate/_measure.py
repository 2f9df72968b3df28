"""Takes the measures: quality variant by variant, times in turns; and compares two figures part by part."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from smelt.evaluate import Metric, Probe, Variant
from smelt.progress import Track
from smelt.spec import SmeltError

__all__ = ["Factory", "measure", "ratio"]

Factory = Callable[[], AbstractContextManager[Variant]]


def measure(
    variants: Sequence[Factory],
    probes: Sequence[Probe],
    *,
    rounds: int = 7,
    warmup: int = 1,
    progress: Track | None = None,
) -> dict[str, list[Metric]]:
    """{variant name: [Metric]}, the metrics in the order of the probes.

    A factory is a context manager to enter: it binds the methods and yields the `Variant`. Unpaired probes go
    variant by variant, each entered once, so a factory that loads its model has it alone in memory. Paired probes
    go in turns: in every round each variant is entered once, in an order that shifts by one from round to round;
    `warmup` rounds come before the `rounds` that count. Variants are never bound at the same time, so they may
    share one model; a factory for paired probes should keep its model from round to round. A paired metric is the
    median of its rounds, which are its samples. `progress` is filled to its total.
    Raises SmeltError when two variants have the same name.
    """
    single = [(at, p) for at, p in enumerate(probes) if not p.paired]
    timed = [(at, p) for at, p in enumerate(probes) if p.paired]
    found: list[dict[int, list[Metric]]] = [{} for _ in variants]
    names = [""] * len(variants)
    steps = len(variants) * (len(single) + len(timed) * (warmup + rounds))

    def take(probe: Probe, variant: Variant, at: int) -> list[Metric]:
        names[at] = variant.name
        if progress is not None:
            progress.advance(0, variant.name)
        metrics = probe(variant)
        if progress is not None:
            progress.advance(progress.total / steps)
        return metrics

    for at, factory in enumerate(variants if single else ()):
        with factory() as variant:
            for place, probe in single:
                found[at][place] = take(probe, variant, at)
    for place, probe in timed:
        taken: list[list[list[Metric]]] = [[] for _ in variants]
        for round_ in range(warmup + rounds):
            for turn in range(len(variants)):
                at = (round_ + turn) % len(variants)
                with variants[at]() as variant:
                    metrics = take(probe, variant, at)
                if round_ >= warmup:
                    taken[at].append(metrics)
        for at, parts in enumerate(taken):
            found[at][place] = [_collected(metrics) for metrics in zip(*parts, strict=True)]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SmeltError(f"two variants are called '{twice[0]}', so their figures could not be told apart")
    return {name: [m for place in sorted(by) for m in by[place]] for name, by in zip(names, found, strict=True)}


def _collected(parts: Iterable[Metric]) -> Metric:
    parts = list(parts)
    samples = tuple(part.value for part in parts)
    return parts[0]._replace(value=float(statistics.median(samples)), samples=samples, weights=())


def ratio(a: Metric, b: Metric, *, seed: int = 0, draws: int = 2000) -> tuple[float, float, float]:
    """(a / b, low, high) with a paired 95 % bootstrap interval; `ratio(b, a)` is its exact inverse.

    With weights (documents, queries): the quotient of the two ratios of sums; the same parts are drawn for a and b.
    Without (timed rounds): the median over rounds of a_i / b_i. Without samples: a.value / b.value and no interval,
    low = high. Equal zeros have the ratio 1. Percentile intervals are too narrow for few parts, so the
    levels are widened by the t distribution (Hesterberg, arXiv:1411.5279: expanded percentiles);
    seven rounds give nearly their full range. Raises SmeltError for metrics of different parts.
    """
    if len(a.samples) != len(b.samples) or len(a.weights) != len(b.weights):
        raise SmeltError(f"'{a.name}' was measured on {len(a.samples)} parts and '{b.name}' on {len(b.samples)}; they cannot be paired")
    count = len(a.samples)
    if count == 0:
        value = float(_quotient(np.float64(a.value), np.float64(b.value)))
        return value, value, value
    x, y = np.asarray(a.samples, np.float64), np.asarray(b.samples, np.float64)
    drawn = np.random.default_rng(seed).integers(count, size=(draws, count))
    if a.weights:
        u, v = np.asarray(a.weights, np.float64), np.asarray(b.weights, np.float64)
        middle = _quotient(x.sum() * v.sum(), y.sum() * u.sum())
        times = np.stack([np.bincount(d, minlength=count) for d in drawn]).astype(np.float64)  # [draws, parts]
        many = _quotient((times @ x) * (times @ v), (times @ y) * (times @ u))
    else:
        each = _quotient(x, y)
        middle, many = _median(each[None])[0], _median(each[drawn])
    many = np.sort(many)
    outside = min(int(_tail(count) * draws), (draws - 1) // 2)
    return float(middle), float(many[outside]), float(many[-1 - outside])


def _quotient(above: Any, below: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((above == 0) & (below == 0), 1.0, above / below)


def _median(rows: np.ndarray) -> np.ndarray:
    """Median of each row; between the middle two their geometric mean, so that inverting commutes with it. A quotient below
    zero is of no time or size (a slope fitted to noise): then their mean."""
    rows = np.sort(rows, axis=1)
    low, high = rows[:, (rows.shape[1] - 1) // 2], rows[:, rows.shape[1] // 2]
    with np.errstate(invalid="ignore"):
        return np.where(low == high, low, np.where(low < 0, (low + high) / 2, np.sqrt(low * high)))


def _tail(count: int) -> float:
    """Share left out on each side: Phi(-sqrt(n / (n - 1)) t), t the 97.5 % point of n - 1 degrees of freedom."""
    if count < 2:
        return 0.0
    normal, free = statistics.NormalDist(), count - 1
    z = normal.inv_cdf(0.975)
    t = z  # Cornish-Fisher expansion of the t quantile
    for power, terms, scale in ((1, (1, 1), 4), (2, (3, 16, 5), 96), (3, (-15, 17, 19, 3), 384)):
        t += sum(c * z ** (2 * i + 1) for i, c in enumerate(terms)) / (scale * free**power)
    return normal.cdf(-math.sqrt(count / free) * t)
