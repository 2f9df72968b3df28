"""iCBS: move a pruning mask, block by block, to where the loss of the whole model is lower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Interval
from torch import Tensor, nn

from smelt.spec import Paper, SmeltError
from smelt.weights import PerMatrix
from smelt.weights._annealing import LARGEST, annealed, exhaustive, swapped
from smelt.weights._surgeon import expected, losses, per_row, quadratic, stacked, traced
from smelt.weights._whole import Bench, Whole
from smelt.weights.wanda import Wanda

__all__ = ["ICBS"]
SOLVERS: dict[str, Callable[..., Tensor]] = {"swap": swapped, "annealing": annealed, "exhaustive": exhaustive}


@dataclass(frozen=True)
class ICBS(Whole):
    """x = argmin d^T H d / 2 - slope g.d + ridge |d|^2 over x in {0, 1}^B with sum x as it is, d = (w - w0) + x * w0; w = (1 - x) * w0.

    x_i = 1 prunes weight i, w0 are the weights when kept, w in d those of now. A block is `block` weights of one map: half of them
    pruned, those of highest |w0 g|, half kept, of lowest. g = mean of g_n and H = mean of g_n g_n^T, g_n the gradient of the loss of
    row n (nats per token) of `samples` calibration rows, drawn anew for every block. Tabu and fixed weights do not take part:
    the blocks visited last, up to the share `tabu` of those that may move; the share `low` of the pruned with the lowest
    |w0| rms(x), `high` of the kept with the highest. So every map keeps the number of its zeros exactly, and kept weights their values.

    `initial` gives the first mask, measured on the model as it is (not behind pruned layers), and the values of what it keeps.
    solver "swap": the exchange of one for another that gains most, until none gains; "annealing": 20 restarts,
    121 B steps each; "exhaustive": all masks, for block <= 20. The report logs expected beside true change of the loss on each
    block's rows: where they part, the block is too large for a quadratic.
    Cost per block: two forward passes and the backward one down to the map over `samples` rows (batch by batch), 12 samples
    context block bytes, 32 block^2 for H and a swap; throughout, two more copies of the maps and 6 bytes per weight. Every block's
    outcome is journaled.

    Raises SmeltError for an `initial` that does not prune each matrix, or prunes n of every m (moves would break the pattern).
    Differs from the paper: the authors' code drops entries of Q up to 1e-12, meant to be the tiny ones but including all
    that are negative; here none is dropped. Fixed weights are ranked by |w0| rms(x); visits: every map once if there are
    blocks enough, the others drawn in proportion to log(size) (reconstruction). Theirs: block 4,096, annealing.
    """

    paper: ClassVar = Paper(
        "Scalable iterative pruning of large language and vision models using block coordinate descent", "arXiv:2411.17796"
    )
    gentlest: ClassVar[Mapping[str, Any]] = {"initial": Wanda(sparsity=0.0)}
    initial: Any = field(default_factory=lambda: Wanda(sparsity=0.7))
    block: Annotated[int, Ge(2)] = 128  # weights decided together
    blocks: Annotated[int, Ge(0)] = 120  # in all
    samples: Annotated[int, Ge(1)] = 16  # calibration rows of a block
    slope: Annotated[float, Ge(0)] = 0.75  # of the linear term
    ridge: Annotated[float, Ge(0)] = 1e-3
    tabu: Annotated[float, Interval(ge=0, lt=1)] = 0.4
    low: Annotated[float, Interval(ge=0, lt=1)] = 0.42
    high: Annotated[float, Interval(ge=0, lt=1)] = 0.35
    solver: Literal["swap", "annealing", "exhaustive"] = "swap"

    def __post_init__(self) -> None:
        initial = self.initial
        if not isinstance(initial, PerMatrix) or initial.quantizes or initial.swaps:
            raise SmeltError(f"icbs: initial is {initial!r}; it begins from a method that prunes each matrix, as wanda(sparsity=0.7)")
        if getattr(initial, "m", 0):
            raise SmeltError(f"icbs: moving weights breaks the pattern of {initial!r}; begin from one without n and m")
        if self.solver == "exhaustive" and self.block > LARGEST:
            raise SmeltError(f"icbs: block={self.block} has too many masks to try them all; the most is block={LARGEST}")

    @classmethod
    def example(cls) -> ICBS:
        return cls(initial=Wanda(sparsity=0.5), block=32, blocks=7, samples=4)

    def __call__(self, model: Any, bench: Bench) -> Any:
        maps = self._maps(bench)
        if not any(int(found.pruned.sum()) for found in maps.values()):
            return model
        ids, mask = stacked(bench.rows, next(model.parameters()).device)
        batch = len(bench.rows[0]["input_ids"])
        book, log = bench.journal("icbs"), []
        visits = _visits([found.kept.numel() for found in maps.values()], self.blocks, bench.seed)
        with _installed(maps), bench.track("search", self.blocks, "blocks") as bar:
            for at, index in enumerate(visits):
                name, key = list(maps)[index], f"block {at}"
                if key not in book:
                    draw = torch.Generator().manual_seed((bench.seed << 31) + at)
                    rows = torch.randperm(len(ids), generator=draw)[: self.samples].to(ids.device)
                    book.put(key, self._step(model, maps[name], ids[rows], mask[rows], batch, draw) | {"map": name})
                maps[name].move(book[key]["visited"], book[key]["flipped"])
                log.append(book[key])
                bar.advance(1)
        for name, found in maps.items():
            bench.put(name, found.made())
        keys = ("map", "expected", "measured")
        bench.report["icbs"] = {
            "moved": sum(len(each["flipped"]) for each in log) // 2,
            **{key: sum(each[key] for each in log) for key in keys[1:]},
            "blocks": [{key: each[key] for key in keys} | {"moved": len(each["flipped"]) // 2} for each in log],
        }
        return model

    def _step(self, model: Any, found: _Map, ids: Tensor, mask: Tensor, batch: int, draw: torch.Generator) -> dict[str, Any]:
        """The outcome of one block: who was in it, who changed sides, expected and measured change of the loss. Leaves all as it was."""
        inputs, slopes, before = traced(model, found.linear, ids, mask, batch)
        whole = slopes.flatten(0, 1).float().mT @ inputs.flatten(0, 1).float()
        chosen = found.block((found.kept.float() * whole).abs().flatten(), self.block, self.tabu)
        was, pruned = found.kept.flatten()[chosen].double(), found.pruned[chosen]
        each = per_row(inputs, slopes, chosen)
        q, _ = quadratic(was, -was * pruned, each, self.slope, self.ridge)
        x = SOLVERS[self.solver](q, pruned, draw)
        flipped = chosen[x != pruned].tolist()
        outcome = {"visited": chosen.tolist(), "flipped": flipped, "expected": expected(each, was * (pruned.double() - x.double()))}
        if not flipped:
            return outcome | {"measured": 0.0}
        found.flip(flipped)
        after = torch.cat([losses(model, *part) for part in zip(ids.split(batch), mask.split(batch), strict=True)])
        found.flip(flipped)
        return outcome | {"measured": float((after.double() - before.double()).mean())}

    def _maps(self, bench: Bench) -> dict[str, _Map]:
        first, maps = bench.results([self.initial]), {}
        for name, linear, given in bench.statistics(("input_rms",)):
            (made,) = first[name]
            assert isinstance(made, Tensor)
            pruned = (made == 0).flatten()
            kept = torch.where(made == 0, linear.weight.data, made)
            rank = (kept.abs().float() * given["input_rms"].float()).flatten()
            fixed = _extreme(rank, pruned, self.low, largest=False) | _extreme(rank, ~pruned, self.high, largest=True)
            movable, visited = ~fixed & (kept != 0).flatten(), torch.zeros_like(rank, dtype=torch.int32)
            maps[name] = _Map(linear, kept, linear.weight.data, pruned, movable, visited)
        return maps


@dataclass
class _Map:
    """The state of one linear map during the search; all but the first three are flat [out * in]."""

    linear: nn.Linear
    kept: Tensor  # [out, in]; w0
    original: Tensor  # [out, in]; what the map came with
    pruned: Tensor
    movable: Tensor  # a weight of 0 is not: moving it would change the number of zeros
    visited: Tensor  # number of the last visit; 0: never
    visits: int = 0

    def made(self) -> Tensor:
        return self.kept.masked_fill(self.pruned.view_as(self.kept), 0.0)

    def flip(self, flipped: list[int]) -> None:
        at = torch.tensor(flipped, dtype=torch.long, device=self.pruned.device)
        self.pruned[at] = ~self.pruned[at]
        self.linear.weight.data.view(-1)[at] = self.kept.flatten()[at].masked_fill(self.pruned[at], 0.0)

    def move(self, visited: list[int], flipped: list[int]) -> None:
        self.flip(flipped)
        self.visits += 1
        self.visited[visited] = self.visits

    def block(self, score: Tensor, size: int, tabu: float) -> Tensor:
        """Positions: up to half of `size` pruned weights of highest score, and as many kept ones of lowest."""
        sides = [self.movable & self.pruned, self.movable & ~self.pruned]
        half = min(size // 2, *(int(side.sum()) for side in sides))
        remembered = int(tabu * min(int(side.sum()) for side in sides) / half) if half else 0
        free = (self.visited == 0) | (self.visited <= self.visits - remembered)
        sides = [side & free for side in sides]
        half = min(half, *(int(side.sum()) for side in sides))
        best = score.masked_fill(~sides[0], -1.0).topk(half).indices
        worst = score.masked_fill(~sides[1], torch.inf).topk(half, largest=False).indices
        return torch.cat([best, worst]).sort().values


@contextmanager
def _installed(maps: Mapping[str, _Map]) -> Iterator[None]:
    """The masked weights in the model, and the original ones again at the end."""
    for found in maps.values():
        found.linear.weight.data = found.made()
    try:
        yield
    finally:
        for found in maps.values():
            found.linear.weight.data = found.original


def _extreme(rank: Tensor, among: Tensor, share: float, largest: bool) -> Tensor:
    """True at that share of those `among` whose rank is lowest, or largest."""
    worst = -torch.inf if largest else torch.inf
    chosen = rank.masked_fill(~among, worst).topk(int(share * int(among.sum())), largest=largest).indices
    return torch.zeros_like(among).scatter(0, chosen, True)


def _visits(sizes: list[int], blocks: int, seed: int) -> list[int]:
    """Which map each block is of: every one once where there are blocks enough, the others in proportion to log(size)."""
    draw = torch.Generator().manual_seed(seed)
    rest = blocks - len(sizes) if blocks >= len(sizes) else blocks
    drawn = torch.multinomial(torch.tensor(sizes).double().log1p(), max(rest, 1), replacement=True, generator=draw)[:rest]
    order = torch.cat([torch.arange(blocks - rest), drawn])
    return order[torch.randperm(blocks, generator=draw)].tolist()
