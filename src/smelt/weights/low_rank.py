"""Low rank: two thin maps in the place of one, chosen for the inputs that the map really gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge, Interval
from torch import Tensor, nn
from torch.nn.functional import linear

from smelt.model._swap import SwappedLinear
from smelt.spec import Paper, SmeltError
from smelt.weights import Budget, PerMatrix
from smelt.weights._factors import factors, rank_within, root

__all__ = ["LowRank"]


class LowRankLinear(SwappedLinear):
    """y = up (down x): down [rank, in], up [out, rank]."""

    owner: ClassVar[str] = "weights.low_rank"

    def __init__(self, up: Tensor, down: Tensor, bias: nn.Parameter | None = None):
        super().__init__(down.shape[1], up.shape[0], bias)
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def settings(self) -> dict[str, Any]:
        return {"rank": self.down.shape[0]}

    @classmethod
    def build(cls, was: Any, *, rank: int) -> Self:
        out, columns = was.weight.shape
        if not 1 <= rank <= min(out, columns):
            raise SmeltError(f"a matrix of {out} x {columns} has no rank of {rank}")
        return cls(was.weight.new_empty(out, rank), was.weight.new_empty(rank, columns), was.bias)

    def product(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.down), self.up)

    def dense(self) -> Tensor:
        return self.up @ self.down


@dataclass(frozen=True)
class LowRank(PerMatrix):
    """W' = U_r U_r^T W, U_r the first r left singular vectors of W S, S S^T = (H + damp mean(diag H) I)^power, H = E x x^T.

    At power 1 no W' of rank r has a smaller mean squared output error E |(W - W') x|^2 (Eckart and Young); with damp 0
    it is the sum of the squared singular values of W S that were dropped. At power 0 the inputs do not count: plain
    SVD. weight [out, in], hessian [in, in] -> a module of two maps, down = U_r^T W [r, in] and up = U_r [out, r].

    r = floor(keep out in / (out + in)), so the two hold at most keep * out * in numbers. A fixed `rank` is for every
    matrix the same, and min(out, in) where it is above that: then W' = W. From r > out in / (out + in) on, the two are
    larger than W; the compression's report has the bytes.

    On the embedded model at keep=0.5 (one seed, 8,192 tokens): 1.47 bits per byte, plain SVD 2.35, dense 1.21. The optimum of
    each matrix is not that of the model: power 0.5 gave 1.45.

    Cost per token: 2 r (out + in) FLOPs and r (out + in) numbers read, the share `keep` of what W costs, in two dense
    products. To make: one calibration pass, then about 9 (in^3 + min(out, in)^3) + 2 out in (in + min(out, in)) FLOPs in
    float64 and 24 in^2 + 16 out in bytes.

    Raises SmeltError where `keep` leaves a matrix without any rank.
    Differs from the paper: the square root of H is taken from its eigenvectors instead of by Cholesky, and is never
    inverted, so inputs that span fewer than `in` dimensions are no error. `damp` only decides between directions the
    calibration hardly saw. Every matrix keeps the same share. The paper's second half, updating the factors one after
    the other by training, is left to a `distill` stage: both are ordinary parameters. Powers between 0 and 1, and
    the layer-by-layer calibration, are ours.
    """

    paper: ClassVar = Paper(
        "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression",
        "arXiv:2403.07378",
        "truncation-aware data whitening",
    )
    swaps: ClassVar[bool] = True
    module: ClassVar = LowRankLinear
    gentlest: ClassVar[Mapping[str, Any]] = {"rank": 1 << 30}
    keep: Annotated[float, Interval(gt=0, le=1)] = 0.5  # numbers stored, as a share of the matrix's
    rank: Annotated[int, Ge(0)] = 0  # the same for every matrix; 0: from `keep`
    power: Annotated[float, Interval(ge=0, le=1)] = 1.0  # how much the inputs count; 0: plain SVD
    damp: Annotated[float, Ge(0)] = 1e-4  # added to the Hessian's diagonal, as a share of its mean

    def __post_init__(self) -> None:
        if self.rank and self.keep != 0.5:
            raise SmeltError(f"low_rank: rank={self.rank} and keep={self.keep:g} say the same thing twice; give one of them")

    def __call__(self, weight: Tensor, hessian: Tensor) -> LowRankLinear:
        out, columns = weight.shape
        by = root(hessian, self.power, self.damp) if self.power else None
        return LowRankLinear(*factors(weight, self._rank(out, columns), by))

    def budget(self, shapes: Sequence[tuple[int, int]]) -> list[Budget]:
        return [Budget(numbers=self._rank(out, columns) * (out + columns)) for out, columns in shapes]

    def _rank(self, out: int, columns: int) -> int:
        found = min(self.rank, out, columns) or rank_within(self.keep * out * columns, out, columns)
        if not found:
            least = (out + columns) / (out * columns)
            raise SmeltError(f"low_rank: keep={self.keep:g} leaves no rank for a matrix of {out} x {columns}; it needs keep={least:.3g}")
        return found
