"""Log-ratios of a mixture of two distributions to both of them, exact where the two are equal."""

from __future__ import annotations

from torch import Tensor

__all__ = ["mixture"]


def mixture(log_a: Tensor, log_b: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """log(M / a), log(M / b) for M = weight a + (1 - weight) b: log-probabilities [..., v] -> [..., v], [..., v].

    With d = log a - log b the smaller of the two is log1p(w expm1(-|d|)), w the weight of the less likely side: between
    log(1 - w) and 0, with no difference of large numbers. Both are exactly 0 where a = b, also where both are 0; the one
    to a side that alone is 0 is +inf. Three buffers of the inputs' size.
    """
    gap = (log_a - log_b).masked_fill_(log_a == log_b, 0)
    less = (gap > 0).to(gap.dtype).mul_(1 - 2 * weight).add_(weight)
    least = gap.abs().neg_().expm1_().mul_(less).log1p_()
    return least - gap.clamp(max=0), gap.clamp_(min=0).add_(least)
