"""The best product of two thin matrices in the place of one, for inputs that are not all alike."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factors", "rank_within", "root"]


def rank_within(numbers: float, out: int, columns: int) -> int:
    """The largest rank whose factors hold at most `numbers` values: floor(numbers / (out + in)), and at most min(out, in)."""
    return min(int(numbers / (out + columns)), out, columns)


def root(second: Tensor, power: float, damp: float) -> Tensor:
    """S [in, in] float64 with S S^T = (H + damp mean(diag H) I)^power, H = `second` symmetric and positive semidefinite."""
    values, vectors = torch.linalg.eigh(second.double())
    values = values.clamp(min=0.0)
    return vectors * (values + damp * values.mean()) ** (power / 2)


def factors(weight: Tensor, rank: int, by: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(up [out, rank], down [rank, in]) in the dtype of `weight` with the least |(W - up down) S|, S = `by` (None: identity).

    The columns of `up` are the first left singular vectors U_r of W S, and down = U_r^T W. That is the truncated
    decomposition U_r U_r^T W S = U_r Sigma_r V_r^T with S taken off again, but nothing is inverted, so S may be
    singular. They come from the smaller of the two Gram matrices, in float64: sums of squared singular values are
    exact to 1e-15 of the largest; single ones below 1e-8 of the largest are noise.
    """
    if not rank:
        return weight.new_empty(weight.shape[0], 0), weight.new_empty(0, weight.shape[1])
    full = weight.double()
    seen = full if by is None else full @ by
    out, columns = seen.shape
    if out <= columns:
        left = torch.linalg.eigh(seen @ seen.mT).eigenvectors.flip(1)[:, :rank]
    else:
        right = torch.linalg.eigh(seen.mT @ seen).eigenvectors.flip(1)[:, :rank]
        left = torch.linalg.qr(seen @ right).Q  # orthogonal columns already, but for rounding: only their length goes
    return left.to(weight.dtype).contiguous(), (left.mT @ full).to(weight.dtype).contiguous()
