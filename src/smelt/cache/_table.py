"""Tables of centroids for numbers between -1 and 1 that do not matter alike: Lloyd's iterations in one dimension."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["cost", "fitted", "nearest", "normed", "quantiles", "sampled"]

ITERATIONS = 50
ENTRIES = 1 << 20  # most numbers a table is fitted to
TOKENS = 4096  # most tokens looked at of a layer


def sampled(rows: int, tokens: int, first: int, batches: int) -> Tensor:
    """Places of [rows * tokens] to look at, evenly spread, none of a row's `first` tokens, at most TOKENS in all batches."""
    places = torch.arange(rows * tokens).view(rows, tokens)[:, min(first, tokens - 1) :].flatten()
    most = max(1, TOKENS // max(1, batches))
    return places[:: -(-len(places) // most)]


def quantiles(x: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(low, high) of every column of x [n, c], with floor(share n / 2) numbers beyond each."""
    n = len(x)
    beyond = min(int(share * n / 2 + 1e-9), (n - 1) // 2)
    ranked = x.sort(0).values
    return ranked[beyond], ranked[n - 1 - beyond]


def fitted(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """2^bits centroids C with a small sum weight (x - C)^2, ascending, float64. Never a larger one than without weights.

    Quantiles first, then Lloyd with equal weights, then with `weight`: from there it only falls.
    """
    step = -(-len(x) // ENTRIES)
    x, order = x[::step].double().sort()
    weight = weight[::step].double()[order]
    at = ((torch.arange(2**bits, device=x.device) + 0.5) / 2**bits * len(x)).long().clamp(max=len(x) - 1)
    table = _lloyd(x, torch.ones_like(x), x[at])
    return _lloyd(x, weight, table) if weight.sum() > 0 else table


def _lloyd(x: Tensor, weight: Tensor, table: Tensor) -> Tensor:
    """Sorted x. Sums over the cells are differences of running sums; an empty cell keeps its centroid."""
    zero = x.new_zeros(1)
    mass, moment = torch.cat([zero, weight.cumsum(0)]), torch.cat([zero, (weight * x).cumsum(0)])
    for _ in range(ITERATIONS):
        ends = torch.searchsorted(x, (table[1:] + table[:-1]) / 2)
        ends = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(x))])
        cell = mass[ends[1:]] - mass[ends[:-1]]
        full = cell > 1e-12 * mass[-1]
        mean = (moment[ends[1:]] - moment[ends[:-1]]) / torch.where(full, cell, 1.0)
        moved = torch.where(full, mean, table).sort().values
        if torch.equal(moved, table):
            break
        table = moved
    return table


def nearest(x: Tensor, table: Tensor) -> Tensor:
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def cost(x: Tensor, weight: Tensor, table: Tensor) -> float:
    """sum weight (x - C)^2 with the nearest centroids."""
    x = x.double()
    return float((weight.double() * (x - table[nearest(x, table)]).square()).sum())


def normed(x: Tensor, table: Tensor) -> Tensor:
    """Q-Norm: the centroids moved so that the decoded numbers have the mean and deviation of x."""
    x = x.double()
    coded = table[nearest(x, table)]
    if len(x) < 2 or coded.std() == 0:
        return table
    return (table - coded.mean()) * (x.std() / coded.std()) + x.mean()
