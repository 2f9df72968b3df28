"""R-Sparse: large inputs use their columns, the many small ones share a low-rank map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from smelt.model._swap import SwappedLinear
from smelt.spec import Paper, SmeltError
from smelt.weights import Budget, PerMatrix
from smelt.weights._factors import factors, rank_within, root

__all__ = ["RSparse"]

GATHERS = 1 << 20  # weights of a matrix from which on reading only some columns pays; below, finding them costs more


class RSparseLinear(SwappedLinear):
    """y = W (m * x) + up (down ((1 - m) * x)), m_j = |x_j| norm_j > threshold.

    columns [in, out] is W^T, so that what one input is multiplied with lies together. One float32 token on a CPU reads
    only the columns with m_j = 1 when they are at most half of a large matrix; all else is a masked dense product.
    energy [in] is the share of sum x_j^2 with m_j = 1 in calibration; only `dense` reads it.
    """

    owner: ClassVar[str] = "weights.r_sparse"

    norm: Tensor
    energy: Tensor
    threshold: Tensor

    def __init__(self, columns: Tensor, factors: tuple[Tensor, Tensor], about: tuple[Tensor, Tensor, Tensor], bias: Any = None):
        super().__init__(columns.shape[0], columns.shape[1], bias)
        self.columns, self.up, self.down = nn.Parameter(columns), nn.Parameter(factors[0]), nn.Parameter(factors[1])
        for name, value in zip(("norm", "energy", "threshold"), about, strict=True):
            self.register_buffer(name, value)

    def settings(self) -> dict[str, Any]:
        return {"rank": self.down.shape[0]}

    @classmethod
    def build(cls, was: Any, *, rank: int) -> Self:
        out, columns = was.weight.shape
        if not 0 <= rank <= min(out, columns):
            raise SmeltError(f"a matrix of {out} x {columns} has no rank of {rank}")
        new = was.weight.new_empty
        about = [new(size, dtype=torch.float32) for size in (columns, columns, ())]
        return cls(new(columns, out), (new(out, rank), new(rank, columns)), (about[0], about[1], about[2]), was.bias)

    def kept(self, x: Tensor) -> Tensor:
        """m: which inputs use their own columns."""
        return x.abs().float() * self.norm.float() > self.threshold.float()

    def product(self, x: Tensor) -> Tensor:
        kept = self.kept(x)
        made = self._gathered(x, kept)
        if made is None:
            made = x.masked_fill(~kept, 0.0) @ self.columns
        return made if not self.down.shape[0] else made + linear(linear(x.masked_fill(kept, 0.0), self.down), self.up)

    def _gathered(self, x: Tensor, kept: Tensor) -> Tensor | None:
        """W (m * x) from the columns of m alone, None where that would not pay (or a gradient is wanted)."""
        single = x.numel() == self.in_features and x.device.type == "cpu" and x.dtype == torch.float32
        if not single or torch.is_grad_enabled() or self.columns.numel() < GATHERS:
            return None
        flat = x.reshape(-1)
        chosen = kept.reshape(-1).nonzero()[:, 0]
        if 2 * len(chosen) > len(flat):
            return None
        parts = torch.get_num_threads()  # a bag runs on one thread
        starts = torch.arange(parts) * len(chosen) // parts
        sums = embedding_bag(chosen, self.columns, starts, mode="sum", per_sample_weights=flat[chosen])
        return sums.sum(0).view(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        energy = self.energy.to(self.columns.dtype)
        return self.columns.mT * energy + (self.up @ self.down) * (1 - energy)


@dataclass(frozen=True)
class RSparse(PerMatrix):
    """y = W (m * x) + U_r S_r V_r^T ((1 - m) * x), m_j = 1 where |x_j| |W_:j| > t, W = U S V^T cut to rank r.

    With s = `sparsity` and a = `alpha`, t lets the share (1 - s) a of all inputs of the calibration pass through their
    columns, and r = floor((1 - s) (1 - a) out in / (out + in)): a token reads at most (1 - s) out in weights, and one
    number per input for |W_:j|. a = 1 is activation sparsity alone, a = 0 low rank alone (but for an input above all
    those seen). weight [out, in], inputs [n, in] -> a module. At `power` 1 the low-rank map is the best one for the
    small inputs: that of `low_rank` with H = E ((1 - m) * x)((1 - m) * x)^T; at 0 (the paper) plain SVD of W.

    It saves what is read, not what is stored: out in + r (out + in) + 2 in + 1 numbers lie in memory, more than W.
    `moved(out, in)` counts the bytes of a token. FLOPs go down alike, to about 2 (1 - s) out in, but only where the
    columns are gathered. Eager torch does not: a prompt, a batch, a GPU and small matrices run a masked dense product
    and take longer than W by the low-rank part. One float32 token on a CPU does gather (`embedding_bag`, no copy):
    against W alone, one thread, 4096 x 11008, r = 0, 31 paired rounds on a shared machine, 1.06 times as fast
    (95 %: 0.84 to 1.36) with half of the inputs kept, 1.19 (1.06 to 1.29) with 40 %, 1.9 (1.7 to 2.2) with 25 % and
    3.4 (3.1 to 6.9) with 10 %: nothing sure at s = 0.5. 2048 x 2048 gave 1.3 at a half, 512 x 512 1.0, 256 x 256 0.7.

    Cost to make: one calibration pass, a selection among n in values, and about 9 min(out, in)^3 + 4 out in
    min(out, in) FLOPs in float64 (at power > 0 also 9 in^3 + 2 (n + out) in^2).

    That a low-rank map helps does not show on the embedded model (s = 0.5, one seed, 2,048 tokens, 8 rows): bits per byte
    1.062 dense, 1.126 at a = 1, 1.141 at 0.95, 1.316 at 0.5, where `power` 1 gives 1.213: its matrices are far from low rank.

    `alpha` is one for all maps; a search over layers is `evopress` with levels r_sparse(alpha=...).
    Differs from the paper: t from up to 4,096 tokens, not one sample of 512; r from each matrix's own size, where the authors' code
    takes the hidden size and so overruns its budget for shared keys and values; no part of a prompt is kept dense (the code
    keeps the first half of each sequence in its evaluation). `power` is ours.
    """

    paper: ClassVar = Paper("R-Sparse: Rank-Aware Activation Sparsity for Efficient LLM Inference", "arXiv:2504.19449", "section 3")
    swaps: ClassVar[bool] = True
    module: ClassVar = RSparseLinear
    gentlest: ClassVar[Mapping[str, Any]] = {"sparsity": 0.0, "alpha": 1.0}
    sparsity: Annotated[float, Interval(ge=0, lt=1)] = 0.5  # share of the weights that a token does not read
    alpha: Annotated[float, Interval(ge=0, le=1)] = (
        0.95  # of what it reads, the share that is columns; searched for Llama 3: 0.96 on average
    )
    power: Annotated[float, Interval(ge=0, le=1)] = 0.0  # how much the small inputs count in the low-rank map
    damp: Annotated[float, Ge(0)] = 1e-4  # of their second moments, as a share of its mean; read at power > 0

    def __call__(self, weight: Tensor, inputs: Tensor) -> RSparseLinear:
        out, columns = weight.shape
        norm, x = weight.double().norm(dim=0).float(), inputs.float()
        score = x.abs() * norm
        threshold = _threshold(score, self.share)
        kept = score > threshold
        square, small = x.double().square(), x.masked_fill(kept, 0.0).double()
        total = square.sum(0)
        energy = torch.where(total > 0, square.masked_fill(~kept, 0.0).sum(0) / total, 1.0).float()
        by = root(small.mT @ small / len(small), self.power, self.damp) if self.power else None
        return RSparseLinear(weight.mT.contiguous(), factors(weight, self._rank(out, columns), by), (norm, energy, threshold))

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        return [Budget(numbers=out * n + self._rank(out, n) * (out + n) + 2 * n + 1) for out, n in shapes]

    def moved(self, out: int, columns: int, size: int = 2) -> float:
        """Bytes of weights a token reads in a map [out, columns] of `size` bytes each, where the columns are gathered (W: size out in)."""
        return size * (self.share * out * columns + self._rank(out, columns) * (out + columns) + columns)

    @property
    def share(self) -> float:
        """Of the inputs, those that use their own columns."""
        return (1 - self.sparsity) * self.alpha

    def _rank(self, out: int, columns: int) -> int:
        return rank_within((1 - self.sparsity) * (1 - self.alpha) * out * columns, out, columns)


def _threshold(score: Tensor, share: float) -> Tensor:
    """The value that round(share * n) of the n scores are above (fewer when some are equal); 0 when that is all of them."""
    below = score.numel() - round(share * score.numel())
    return score.flatten().kthvalue(below).values if below else score.new_zeros(())
