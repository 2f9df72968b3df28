"""Minimise E(x) = x^T Q x over x in {0, 1}^B with the number of ones fixed: the step of methods that move a mask.

Each solver is (Q [B, B] float64, x [B] bool, draw) -> x [B] bool with as many ones and no higher energy. The symmetric
part S = (Q + Q^T) / 2 decides. Turning x_i off and x_j on changes E by
    -(S_ii + f_i) + (S_jj + f_j) - 2 S_ij,    f = 2 (S - diag S) x.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from smelt.spec import SmeltError

__all__ = ["LARGEST", "annealed", "energy", "exhaustive", "swapped"]

LARGEST = 20  # variables that can be enumerated: 184,756 masks of 10 ones
LOW, HIGH, GROWTH = 1e-3, 100.0, 1.1  # inverse temperatures, in units of 1 / max|S|


def energy(q: Tensor, x: Tensor) -> Tensor:
    """x^T Q x of each row of x [..., B]."""
    x = x.to(q.dtype)
    return ((x @ q) * x).sum(-1)


def exhaustive(q: Tensor, x: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """The minimum, by trying all masks of as many ones. Raises SmeltError beyond `LARGEST` variables."""
    if len(x) > LARGEST:
        raise SmeltError(f"{len(x)} weights have too many masks to try them all; the most is block={LARGEST}")
    chosen = torch.tensor(list(itertools.combinations(range(len(x)), int(x.sum()))), dtype=torch.long, device=x.device)
    masks = torch.zeros(len(chosen), len(x), dtype=torch.bool, device=x.device).scatter(1, chosen, True)
    best = masks[energy(q, masks).argmin()]
    return best if energy(q, best) < energy(q, x) else x.clone()


def swapped(q: Tensor, x: Tensor, draw: torch.Generator | None = None) -> Tensor:
    """Descend by the one swap (a one off, a zero on) that gains most until none gains: a minimum among its neighbours.

    Cost: ones * zeros sums per swap. A gain below 1e-12 max|S| is rounding and ends it.
    """
    s, ones, zeros = (q + q.mT) / 2, x.nonzero()[:, 0], (~x).nonzero()[:, 0]
    if not len(ones) or not len(zeros):
        return x.clone()
    cost, field, cross = s.diagonal(), _field(s, x[None])[0], 2 * s[ones][:, zeros]
    least = -1e-12 * float(s.abs().max())
    for _ in range(len(x) ** 2):  # each step gains, so no mask comes twice; far fewer are needed
        total = cost + field
        change = (total[zeros] - total[ones, None]).sub_(cross)
        i, j = divmod(int(change.argmin()), len(zeros))
        if not change[i, j] < least:
            break
        off, on = int(ones[i]), int(zeros[j])
        field += 2 * (_column(s, on) - _column(s, off))
        ones[i], zeros[j] = on, off
        cross[i], cross[:, j] = 2 * s[on, zeros], 2 * s[ones, off]
    return torch.zeros_like(x).index_fill(0, ones, True)


def annealed(q: Tensor, x: Tensor, draw: torch.Generator, restarts: int = 20) -> Tensor:
    """Simulated annealing of `restarts` chains at once, from x and from random masks; the best end is descended by `swapped`.

    A sweep is B proposals, each a random one and a random zero of each chain, taken with probability min(1, exp(-b dE)).
    b runs from 0.001 to 100 in steps of 10 %, one sweep each: 121 B steps of `restarts` sums of B.
    """
    size, ones = len(x), int(x.sum())
    s = (q + q.mT) / 2
    scale = float(s.abs().max()) if s.numel() else 0.0
    if scale == 0.0 or ones in (0, size):
        return x.clone()
    s = s / scale
    order = torch.rand(restarts, size, generator=draw).argsort(1)
    order[0] = torch.cat([x.nonzero()[:, 0], (~x).nonzero()[:, 0]]).cpu()
    order = order.to(q.device)  # of each chain: its ones, then its zeros
    field = _field(s, _mask(order, ones))
    cost, chain = s.diagonal(), torch.arange(restarts, device=q.device)
    beta = LOW
    while beta <= HIGH:
        off_at = torch.randint(0, ones, (size, restarts), generator=draw).to(q.device)
        on_at = torch.randint(ones, size, (size, restarts), generator=draw).to(q.device)
        limit = -torch.rand(size, restarts, generator=draw, dtype=torch.float64).log().to(q.device) / beta
        for a, b, most in zip(off_at, on_at, limit, strict=True):
            off, on = order[chain, a], order[chain, b]
            gain = cost[on] + field[chain, on] - cost[off] - field[chain, off] - 2 * s[off, on]
            move = gain <= most
            step = s[on] - s[off]
            step[chain, on] -= cost[on]
            step[chain, off] += cost[off]
            field += 2 * move[:, None] * step
            order[chain, a], order[chain, b] = torch.where(move, on, off), torch.where(move, off, on)
        beta *= GROWTH
    ends = torch.cat([x[None], _mask(order, ones)])
    return swapped(q, ends[energy(q, ends).argmin()])


def _mask(order: Tensor, ones: int) -> Tensor:
    return torch.zeros_like(order, dtype=torch.bool).scatter(1, order[:, :ones], True)


def _field(s: Tensor, x: Tensor) -> Tensor:
    """f = 2 (S - diag S) x of each row of x [n, B]."""
    x = x.to(s.dtype)
    return 2 * (x @ s - x * s.diagonal())


def _column(s: Tensor, at: int) -> Tensor:
    """Column of S without its diagonal entry."""
    made = s[:, at].clone()
    made[at] = 0
    return made
