"""EvoPress: an evolutionary search for the level of compression of every map, or for what can be dropped, under a budget."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge
from torch import nn

from smelt import registry
from smelt.evolution import evolve
from smelt.model._slice import everything, head_input, sliced
from smelt.model._walk import attention_of, blocks, linears, prefix_of
from smelt.spec import Paper, SmeltError
from smelt.weights import PerMatrix
from smelt.weights._levels import Divergence, Nothing, Rack, Stand, Unit, mutated, spread, stands, stored
from smelt.weights._whole import Bench, Whole
from smelt.weights.sparsegpt import SparseGPT

__all__ = ["EvoPress"]

USUAL = tuple(SparseGPT(sparsity=share) for share in (0.4, 0.5, 0.6, 0.7, 0.8))


@dataclass(frozen=True)
class EvoPress(Whole):
    """argmin over levels l of mean_i KL(p_dense(. | x_<i) || p_l(. | x_<i)) with sum_u stored(u, l_u) <= budget.

    Units u: single maps, the attentions and mlps, or whole blocks. Levels: what the methods of `levels` make of a map,
    all from one calibration pass over the dense model; the budget is what level `uniform` stores when every unit has
    it, and there the search begins. Or `drop=K`: a unit is kept or dropped, the budget is the model less K blocks, and
    the search begins with the K before the last. Stored: bits where levels quantize, else values that are not zero; whole
    numbers, so no candidate exceeds the budget by even one.

    Search (smelt.evolution): of one parent `offspring` children, each 1 to 3 switches away (min of two draws): one unit
    a level up, others down until the total fits. Stage s measures on the first `rows[s]` calibration rows and keeps the
    best `survivors[s]`; the parent joins the last stage only. With `initial` > 1 the first parent is chosen from as many random
    candidates, the uniform one among them; generations=0 then is random search. KL in nats per token, on fixed
    rows: the parent's never rises (report["search"]: kl_start, kl, the level of each unit).

    Cost: the calibration pass of all levels, then per generation offspring * rows[0] + survivors[0] * rows[1] + ... rows
    forward. Memory: a dense copy of all maps per level (swapped in by reference), 4 * vocabulary bytes per token of the
    last stage's rows. The search goes on at its generation after a kill; the levels are made again.

    What it leaves: a plain checkpoint. Mixed bit widths are stored dense, with the values measured (report["stored"]).
    Blocks dropped whole are cut out; a lone attention or mlp is dropped by zeros in o_proj or down_proj (and their biases).

    Raises SmeltError for levels that store the same or mix bits with zeros, too few calibration rows, models
    without a language head, and for `drop` those whose blocks cannot be cut.
    Differs from the paper: switches between units of unequal size, which it allows only among equals; attentions and
    mlps dropped are traded by their weights instead of counted apart; the same rows in every generation instead of
    new ones; exact KL. Levels are calibrated on the dense model (reconstruction).
    """

    paper: ClassVar = Paper(
        "EvoPress: Accurate Dynamic Model Compression via Evolutionary Search", "arXiv:2410.14649", "section 3, algorithm 1"
    )
    gentlest: ClassVar[Mapping[str, Any]] = {}
    levels: tuple[Any, ...] = ()  # PerMatrix methods; (): sparsegpt at 40, 50, 60, 70 and 80 %
    uniform: Annotated[int, Ge(-1)] = -1  # place in `levels` of the one that sets the budget; -1: the middle one by what it stores
    drop: Annotated[int, Ge(0)] = 0  # blocks' worth of weights to drop; instead of levels
    unit: Literal["map", "part", "block"] | None = None  # what has one level; part: an attention or an mlp. None: map, part for drop
    generations: Annotated[int, Ge(0)] = 30
    offspring: Annotated[int, Ge(1)] = 12
    rows: tuple[Annotated[int, Ge(1)], ...] = (4, 24)  # calibration rows of each stage
    survivors: tuple[Annotated[int, Ge(1)], ...] = (3, 1)  # left after each stage
    initial: Annotated[int, Ge(1)] = 1  # candidates the first parent is chosen from

    def __post_init__(self) -> None:
        for level in self.levels:
            if not isinstance(level, PerMatrix):
                raise SmeltError(f"evopress: levels holds {level!r}; a level is a method for one matrix, as sparsegpt(sparsity=0.5)")
        if len(self.levels) == 1 or self.uniform >= len(self.levels or USUAL):
            raise SmeltError(f"evopress: {len(self.levels)} levels, uniform={self.uniform}; it needs two levels and one of them as uniform")
        if self.drop and (self.levels or self.unit == "map"):
            raise SmeltError("evopress: drop takes away attentions, mlps or blocks: give no levels with it, and unit='part' or 'block'")
        falls = all(a >= b for a, b in pairwise(self.survivors))
        rises = all(a <= b for a, b in pairwise(self.rows))
        if not self.rows or len(self.rows) != len(self.survivors) or not (falls and rises) or self.survivors[-1] != 1:
            raise SmeltError(
                f"evopress: rows={self.rows} must rise and survivors={self.survivors} fall to 1, one of each per stage, as rows=[4, 24], "
                "survivors=[3, 1]"
            )

    @classmethod
    def example(cls) -> Self:
        levels = tuple(SparseGPT(sparsity=share) for share in (0.25, 0.5, 0.75))
        return cls(levels=levels, generations=4, offspring=3, rows=(2, 4), survivors=(2, 1))

    def __call__(self, model: Any, bench: Bench) -> Any:
        modules = {name: module for _, name, module in linears(model)}
        loss = Divergence(model, bench.rows, self.rows, "evopress")
        if self.drop:
            return self._dropped(model, modules, bench, loss)
        methods: tuple[PerMatrix, ...] = self.levels or USUAL
        counted, costs = stored(methods, [(module.out_features, module.in_features) for module in modules.values()])
        totals = [sum(column) for column in zip(*costs, strict=True)]
        if len(set(totals)) < len(totals):
            raise SmeltError(f"evopress: levels store {totals} {counted} in all; two that store the same have nothing to trade")
        order = sorted(range(len(totals)), key=lambda at: -totals[at])
        uniform = len(order) // 2 if self.uniform < 0 else order.index(self.uniform)
        own = dict(zip(modules, costs, strict=True))
        units = [
            Unit(name, maps, [sum(own[one][at] for one in maps) for at in order])
            for name, maps in _grouped(model, modules, self.unit or "map").items()
        ]
        results = bench.results([methods[at] for at in order])
        put_in = {name: stands(module, results[name]) for name, module in modules.items()}
        best = self._search(model, modules, units, put_in, [uniform] * len(units), bench, loss, counted)
        for unit, level in zip(units, best, strict=True):
            for name in unit.maps:
                bench.put(name, results[name][level])
        bench.report["search"]["levels"] = {
            unit.name: registry.text(methods[order[level]]) for unit, level in zip(units, best, strict=True)
        }
        return model

    def _search(
        self,
        model: Any,
        modules: Mapping[str, nn.Linear],
        units: Sequence[Unit],
        put_in: Mapping[str, Sequence[Stand]],
        start: list[int],
        bench: Bench,
        loss: Divergence,
        counted: str,
    ) -> list[int]:
        """The best candidate: the level of each unit. The model is left dense."""
        costs = [unit.costs for unit in units]
        budget = sum(row[level] for row, level in zip(costs, start, strict=True))
        rack = Rack(model, modules, units, put_in)

        def fitness(candidate: list[int], stage: int) -> float:
            rack.install(candidate)
            return loss(stage)

        try:
            with bench.track("search", self.generations + 1, "generations") as bar:
                found = evolve(
                    spread(start, costs, budget, self.initial, random.Random(f"{bench.seed}/initial")),
                    lambda candidate, rng: mutated(candidate, costs, budget, rng),
                    fitness,
                    offspring=self.offspring,
                    survivors=self.survivors,
                    generations=self.generations,
                    seed=bench.seed,
                    journal=bench.journal("search"),
                    each=lambda generation, candidate, value: bar.advance(1),
                )
        finally:
            rack.restore()
        used = sum(row[level] for row, level in zip(costs, found.candidate, strict=True))
        bench.report["search"] = {"counted": counted, "budget": budget, "used": used, "kl_start": found.history[0], "kl": found.fitness}
        return found.candidate

    def _dropped(self, model: Any, modules: Mapping[str, nn.Linear], bench: Bench, loss: Divergence) -> Any:
        keep = everything(model)  # refuses what cannot be cut before the search
        count = len(keep.layers)
        if self.drop >= count:
            raise SmeltError(f"evopress: drop={self.drop} of {count} blocks would leave none")
        names = {module: name for name, module in modules.items()}
        ends = [tuple(names[module] for module in head_input(block)) for block in blocks(model)]
        exits = {name for pair in ends for name in pair}
        units = [
            Unit(name, tuple(one for one in maps if one in exits), [sum(modules[one].weight.numel() for one in maps), 0])
            for name, maps in _grouped(model, modules, self.unit or "part").items()
        ]
        put_in: dict[str, list[Stand]] = {name: [modules[name].weight.data, Nothing(modules[name].out_features)] for name in exits}
        first = {name for pair in ends[max(0, count - 1 - self.drop) : count - 1] for name in pair}
        start = [int(unit.maps[0] in first) for unit in units]
        best = self._search(model, modules, units, put_in, start, bench, loss, "values")
        gone = {name for unit, level in zip(units, best, strict=True) if level for name in unit.maps}
        bench.report["search"]["dropped"] = [unit.name for unit, level in zip(units, best, strict=True) if level]
        keep.layers = [at for at, pair in enumerate(ends) if not gone.issuperset(pair)]
        for name in sorted(gone.intersection(one for at in keep.layers for one in ends[at])):
            bench.put(name, torch.zeros_like(modules[name].weight))
            if modules[name].bias is not None:
                modules[name].bias.data.zero_()
        return sliced(model, keep) if len(keep.layers) < count else model


def _grouped(model: Any, modules: Mapping[str, nn.Linear], unit: str) -> dict[str, tuple[str, ...]]:
    """{name of the unit: its maps}, in the order of the layers."""
    found: dict[str, tuple[str, ...]] = {}
    for at, block in enumerate(blocks(model)):
        inside = set(attention_of(block).modules())
        prefix = f"{prefix_of(model)}{at}"
        for name, module in modules.items():
            if name.startswith(f"{prefix}."):
                part = f"{prefix}.{'attention' if module in inside else 'mlp'}"
                key = {"map": name, "part": part, "block": prefix}[unit]
                found[key] = (*found.get(key, ()), name)
    return found
