"""Levels of compression: what each stores, switches that keep a budget, swapping them into a model, their cost in nats."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor, nn

from smelt.model._swap import SwappedLinear, put
from smelt.spec import SmeltError
from smelt.weights import Codes, PerMatrix, Result

__all__ = ["Divergence", "Nothing", "Rack", "Unit", "mutated", "spread", "stands", "stored"]

Stand = Tensor | nn.Module  # a weight for the map that is there, or another module in its place


class Unit(NamedTuple):
    """Maps that share one level."""

    name: str
    maps: tuple[str, ...]
    costs: list[int]  # what is stored at each level, the most first


# ---------------------------------------------------------------------- budget


def stored(methods: Sequence[PerMatrix], shapes: Sequence[tuple[int, int]]) -> tuple[str, list[list[int]]]:
    """(what is counted, [map][method] how much of it is stored), from `PerMatrix.budget`; whole numbers, so that sums are exact.

    Quantized maps count bits; all others the values that are not zero or that a stand-in holds. Raises SmeltError for both at once.
    """
    units, columns = set(), []
    for method in methods:
        column = []
        for (out, width), budget in zip(shapes, method.budget(shapes), strict=True):
            units.add("values" if budget.bits is None else "bits")
            values = out * width - budget.zeros if budget.numbers is None else budget.numbers
            column.append(values if budget.bits is None else round(budget.bits * out * width))
        columns.append(column)
    if len(units) > 1:
        raise SmeltError("the levels quantize in part and prune in part; bits and zeros have no common budget, so choose one kind")
    return units.pop(), [list(row) for row in zip(*columns, strict=True)]


def switched(levels: Sequence[int], costs: Sequence[Sequence[int]], budget: int, rng: random.Random) -> list[int]:
    """One unit a level up (more stored), others a level down, one after the other, until the total fits the budget again.

    Among units of equal cost one goes down, and the total stays what it was; where room was left none may need to.
    The candidate itself comes back when no unit can go up, or not enough can go down.
    """
    made = list(levels)
    up = [at for at, level in enumerate(made) if level > 0]
    if not up:
        return made
    gentler = rng.choice(up)
    made[gentler] -= 1
    total = sum(row[level] for row, level in zip(costs, made, strict=True))
    down = [at for at, level in enumerate(made) if at != gentler and level + 1 < len(costs[at])]
    while total > budget:
        if not down:
            return list(levels)
        at = rng.choice(down)
        total += costs[at][made[at] + 1] - costs[at][made[at]]
        made[at] += 1
        if made[at] + 1 == len(costs[at]):
            down.remove(at)
    return made


def mutated(levels: Sequence[int], costs: Sequence[Sequence[int]], budget: int, rng: random.Random) -> list[int]:
    """min of two draws from 1, 2, 3 switches: mostly one."""
    for _ in range(min(rng.randint(1, 3), rng.randint(1, 3))):
        levels = switched(levels, costs, budget, rng)
    return list(levels)


def spread(start: Sequence[int], costs: Sequence[Sequence[int]], budget: int, count: int, rng: random.Random) -> list[list[int]]:
    """`count` different candidates, fewer where there are fewer: `start`, and others as many switches away as a draw from 1 .. units."""
    found = [list(start)]
    for _ in range(30 * count):
        if len(found) >= count:
            break
        levels = list(start)
        for _ in range(rng.randint(1, len(start))):
            levels = switched(levels, costs, budget, rng)
        if levels not in found:
            found.append(levels)
    return found


# ---------------------------------------------------------------------- in the model


class Nothing(nn.Module):
    """Zeros in the place of a linear map and its bias."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def stands(module: nn.Linear, results: Sequence[Result]) -> list[Stand]:
    """What computes as each result would."""
    found: list[Stand] = []
    for result in results:
        if isinstance(result, SwappedLinear):
            result.bias = module.bias
            found.append(result.eval())
        else:
            found.append((result.dequantize() if isinstance(result, Codes) else result).to(module.weight.dtype))
    return found


class Rack:
    """Every level of every map, put in and taken out by reference: nothing is copied. `restore` leaves the model as it was."""

    def __init__(self, model: Any, modules: Mapping[str, nn.Linear], units: Sequence[Unit], levels: Mapping[str, Sequence[Stand]]):
        self.model, self.units, self.levels = model, units, levels
        self.plain = {name: (modules[name], modules[name].weight.data) for unit in units for name in unit.maps}
        self.now: list[int | None] = [None] * len(units)

    def install(self, candidate: Sequence[int]) -> None:
        for at, (unit, level) in enumerate(zip(self.units, candidate, strict=True)):
            if level != self.now[at]:
                for name in unit.maps:
                    self._put(name, self.levels[name][level])
                self.now[at] = level

    def _put(self, name: str, stand: Stand) -> None:
        module = self.plain[name][0]
        if isinstance(stand, nn.Module):
            put(self.model, name, stand)
        else:
            module.weight.data = stand
            put(self.model, name, module)

    def restore(self) -> None:
        for name, (_, weight) in self.plain.items():
            self._put(name, weight)
        self.now = [None] * len(self.units)


class Divergence:
    """Mean over tokens of KL(p || q), nats: p of the model when this was made, q of the model as it is when called.

    `counts[s]` rows in stage s, the first of the calibration rows, each stage's among those of the next; padding never counts.
    p is kept exactly, 4 * vocabulary bytes per token. Raises SmeltError when rows are lacking or a stage's are all padding.
    """

    def __init__(self, model: Any, batches: Sequence[Mapping[str, Tensor]], counts: Sequence[int], where: str):
        has = sum(len(batch["input_ids"]) for batch in batches)
        if has < max(counts):
            raise SmeltError(f"{where} measures {max(counts)} rows; the calibration has {has}, so set calibrate: {{rows: {max(counts)}}}")
        if model.get_output_embeddings() is None:
            raise SmeltError(f"{where} compares next-token probabilities; {type(model).__name__} has no language head")
        self.model, self.counts = model, counts
        self.parts: list[tuple[int, Tensor, Tensor, Tensor]] = []  # (rows up to and with it, ids, mask, log p of the tokens that count)
        at = 0
        for batch in batches:
            size = len(batch["input_ids"])
            cuts = [0, *sorted({count - at for count in counts if 0 < count - at < size}), size]
            for first, end in pairwise(cuts):
                if at + end <= max(counts):
                    ids, mask = (batch[key][first:end].to(model.device) for key in ("input_ids", "attention_mask"))
                    self.parts.append((at + end, ids, mask, self._log_probabilities(ids, mask)))
            at += size
        if any(not sum(len(p) for end, _, _, p in self.parts if end <= count) for count in counts):
            raise SmeltError(f"{where}: the first {min(counts)} calibration rows are all padding")

    def _log_probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return logits[mask.bool()].float().log_softmax(-1)

    def __call__(self, stage: int) -> float:
        total, tokens = 0.0, 0
        for end, ids, mask, p in self.parts:
            if end <= self.counts[stage]:
                q = self._log_probabilities(ids, mask)
                total += float(nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).double().sum())
                tokens += len(p)
        return total / tokens
