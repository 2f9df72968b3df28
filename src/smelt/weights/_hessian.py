"""What methods share that correct the weights still to come for what the column just rewritten cost.

With H the mean of x x^T, E |(W - W') x|^2 = tr((W - W') H (W - W')^T), one independent problem per row of W.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from smelt.spec import SmeltError

__all__ = ["BLOCK", "check_pattern", "corrected", "inverse_factor", "lowest_of_groups", "output_error", "pattern_zeros"]

BLOCK = 128  # columns whose updates to all later columns are made in one matmul


def output_error(weight: Tensor, made: Tensor, hessian: Tensor) -> Tensor:
    """tr((W - W') H (W - W')^T) in the dtype of the Hessian: what the change does to the squared output, per token."""
    off = weight.to(hessian.dtype) - made.to(hessian.dtype)
    return ((off @ hessian) * off).sum()


def inverse_factor(hessian: Tensor, damp: float, name: str) -> tuple[Tensor, Tensor]:
    """(U upper triangular with U^T U = (H + damp mean(diag H) I)^-1, dead [in]: the columns whose input is always 0).

    The Cholesky factor of H read from its last row and column is H = R R^T with R upper, so U = R^-1: one
    factorization and one triangular inverse instead of an inverse between two factorizations.
    """
    full = hessian.double().clone()
    diagonal = full.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    diagonal += damp * diagonal.mean()
    full = full.flip(0, 1)
    full, failed = torch.linalg.cholesky_ex(full)  # each step lets go of the matrix before it: at most three are held at once
    if failed.any():
        raise SmeltError(f"{name}: the inputs span fewer than the {len(full)} columns, so damp={damp} is too small; try damp=0.01")
    full = full.flip(0, 1)
    unit = torch.eye(len(full), dtype=full.dtype, device=full.device)
    return torch.linalg.solve_triangular(full, unit, upper=True, out=unit), dead


def corrected(weight: Tensor, factor: Tensor, column: Callable[[int, Tensor], Tensor], block: int = BLOCK) -> Tensor:
    """Column j becomes column(j, W[:, j:]) and the later ones take up the error: W[:, k] -= err U[j, k] / U[j, j].

    In `column` the given tensor is up to date as far as the end of the block, and to the end at a block's first column.
    Updates beyond the block wait for its end (the paper's lazy batches: the same sums in another order).
    """
    work, count = weight.double().clone(), weight.shape[1]
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors = torch.zeros_like(work[:, start:stop])
        for j in range(start, stop):
            new = column(j, work[:, j:])
            error = (work[:, j] - new) / factor[j, j]
            work[:, j + 1 : stop] -= torch.outer(error, factor[j, j + 1 : stop])
            work[:, j], errors[:, j - start] = new, error
        work[:, stop:] -= errors @ factor[start:stop, stop:]
    return work


def check_pattern(name: str, n: int, m: int, sparsity: float) -> None:
    """n and m go together, and sparsity is then 1 - n / m; its default 0.5 means that nothing was asked."""
    if (n > 0) != (m > 0) or n > m:
        raise SmeltError(f"{name}: n={n} and m={m}; n of every m columns are kept, as n=2, m=4 (both 0: no pattern)")
    if m and sparsity not in (0.5, 1 - n / m):
        raise SmeltError(f"{name}: n={n} of m={m} leaves sparsity={1 - n / m:g}, not {sparsity:g}; give one or the other")


def pattern_zeros(name: str, n: int, m: int, columns: int) -> int:
    """Zeros of a row of `columns` weights under n:m. Raises SmeltError where m does not divide them."""
    if columns % m:
        fit = max(d for d in range(1, m + 1) if columns % d == 0)
        raise SmeltError(f"{name}: m={m} does not divide the {columns} columns of a matrix; the nearest below that does is m={fit}")
    return columns // m * (m - n)


def lowest_of_groups(score: Tensor, n: int, m: int) -> Tensor:
    """True at the m - n lowest scores of every m neighbouring columns; of equals the first."""
    parted = score.unflatten(1, (-1, m))
    lowest = parted.argsort(dim=2, stable=True)[..., : m - n]
    return torch.zeros_like(parted, dtype=torch.bool).scatter(2, lowest, True).flatten(1)
