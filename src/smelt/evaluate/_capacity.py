"""Which size of a teacher suits a student best: the lowest point of a parabola through losses over log size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smelt.spec import SmeltError

__all__ = ["Optimum", "optimum"]


class Optimum(NamedTuple):
    """`size` is None when the best is not surely between the smallest and the largest size: no interior optimum."""

    size: float | None
    low: float  # 95 % bootstrap interval of the best size within the measured range
    high: float
    best: float  # the best size within the range, at one of its ends perhaps


def optimum(sizes: Sequence[float], losses: Sequence[Sequence[float]], *, draws: int = 2000, seed: int = 0) -> Optimum:
    """The size at which loss = a + b log(size) + c log(size)^2, fitted by least squares, is lowest; losses [sizes][seeds].

    The interval is of the fit with its residuals drawn anew, each enlarged by sqrt(n / (n - 3)) for the three numbers fitted.
    An interval that touches an end of the range leaves open whether a smaller or larger teacher were better still.
    Raises SmeltError for fewer than four different sizes, or sizes and losses that are no positive and finite numbers.
    """
    x = np.log(np.repeat(np.asarray(sizes, float), [len(row) for row in losses]))
    y = np.concatenate([np.asarray(row, float) for row in losses])
    if len(sizes) != len(losses) or len(set(x.tolist())) < 4 or not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise SmeltError("a fit of loss over log size needs at least four different positive sizes, each with its finite losses")
    middle = x.mean()
    powers = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], 1)  # centred: log sizes alone are nearly collinear
    solve = np.linalg.pinv(powers)
    fitted = powers @ (solve @ y)
    spread = (y - fitted) * np.sqrt(len(y) / max(1, len(y) - 3))
    drawn = fitted + np.random.default_rng(seed).choice(spread, (draws, len(y)))
    ends = x.min() - middle, x.max() - middle
    best = float(np.exp(_lowest(solve @ y, *ends) + middle))
    found = np.sort([np.exp(_lowest(solve @ row, *ends) + middle) for row in drawn])
    low, high = (float(np.quantile(found, share)) for share in (0.025, 0.975))
    edge = 1e-9
    inside = min(sizes) * (1 + edge) < min(low, best) and max(high, best) < max(sizes) * (1 - edge)
    return Optimum(best if inside else None, low, high, best)


def _lowest(fit: np.ndarray, left: float, right: float) -> float:
    """Where a + b x + c x^2 is lowest within [left, right]."""
    a, b, c = fit
    if c > 0 and left < -b / (2 * c) < right:
        return float(-b / (2 * c))
    return min((left, right), key=lambda x: a + b * x + c * x * x)
