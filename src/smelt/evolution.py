"""Evolutionary search with selection in steps: one parent, many offspring, the cheapest measurement first.

Candidates are opaque: a list of levels, a recipe. The search knows them by the JSON that `encode` makes of them. It
is the (1 + lambda) scheme of EvoPress (arXiv:2410.14649, algorithm 1), used by `weights/evopress.py` and by the
search over whole recipes.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from smelt.spec import SmeltError

__all__ = ["Evolved", "Memory", "evolve"]

C = TypeVar("C")
TRIES = 30  # mutations drawn for each place in a generation before it stays empty


class Memory(Protocol):
    """What a kill must not lose; `smelt.journal.Journal` is one."""

    def __contains__(self, key: str) -> bool: ...
    def __getitem__(self, key: str) -> Any: ...
    def put(self, key: str, value: Any) -> None: ...


class Evolved(NamedTuple, Generic[C]):
    """The best candidate, its fitness in the last stage, and the fitness of the parent of every generation from 0 on."""

    candidate: C
    fitness: float
    history: list[float]  # never rises
    calls: list[int]  # of `fitness`, per stage, by this process: a search that went on counts from where it went on


def evolve(
    parents: Sequence[C],
    mutate: Callable[[C, random.Random], C],
    fitness: Callable[[C, int], float],
    *,
    offspring: int,
    survivors: Sequence[int],
    generations: int,
    seed: int,
    journal: Memory | None = None,
    encode: Callable[[C], Any] = lambda candidate: candidate,
    decode: Callable[[Any], C] = lambda value: value,
    each: Callable[[int, C, float], None] | None = None,
) -> Evolved[C]:
    """parent(g + 1) = argmin over {parent(g)} + select(mutate(parent(g)) x offspring) of fitness in the last stage.

    Stage s measures all that are left with `fitness(candidate, s)`, lower is better, and keeps the best `survivors[s]`;
    the last keeps 1. The parent joins only the last stage, with the figure it has, so that noise in a cheap stage
    cannot lose it; an offspring as good as the parent takes its place. Generation 0 is the same selection among
    `parents`, of which there may be one; `generations=0` with many is a random search.

    `fitness` must be a pure function: it is asked once for each candidate and stage. inf is a candidate out of
    bounds. `mutate` must leave its argument alone and draw from the generator given, which depends on `seed` and the
    generation only. An offspring equal to the parent or to one before it in its generation is drawn again, up to
    30 times; a small neighbourhood gives a smaller generation.
    `journal` holds the parent of each generation: the same call with it goes on after the last one and ends the same;
    more `generations` may be asked for.
    `encode` and `decode` translate candidates into what JSON holds (give `decode=tuple` for tuples).
    `each(generation, parent, fitness)` is called for every generation, those found in the journal too.

    Cost: the number of parents, then `offspring`, calls in stage 0, `survivors[s - 1]` in stage s, per generation.
    Raises SmeltError for settings that contradict each other, for a fitness that is not a number, and for a journal of
    another search.
    """
    survivors = [int(kept) for kept in survivors]
    if not survivors or survivors[-1] != 1 or any(a < b for a, b in pairwise(survivors)):
        raise SmeltError(f"search: survivors={survivors} must fall from stage to stage and end with 1, as [8, 2, 1]")
    if not parents or offspring < 1 or generations < 0:
        raise SmeltError(f"search: {len(parents)} parents, offspring={offspring}, generations={generations}; at least 1, 1 and 0")
    calls, known = [0] * len(survivors), [dict[str, float]() for _ in survivors]

    def name(candidate: C) -> str:
        return json.dumps(encode(candidate), sort_keys=True)

    def measured(candidate: C, stage: int) -> float:
        key = name(candidate)
        if key not in known[stage]:
            calls[stage] += 1
            known[stage][key] = value = float(fitness(candidate, stage))
            if math.isnan(value):
                raise SmeltError(f"search: the fitness of {key[:200]} in stage {stage} is not a number")
        return known[stage][key]

    def best(candidates: list[C], parent: tuple[C, float] | None) -> tuple[C, float]:
        for stage, kept in enumerate(survivors):
            scores = [measured(candidate, stage) for candidate in candidates]
            order = sorted(range(len(candidates)), key=scores.__getitem__)[:kept]  # stable: the one drawn first on a tie
            candidates, scores = [candidates[i] for i in order], [scores[i] for i in order]
        if parent is not None and (not candidates or scores[0] > parent[1]):
            return parent
        return candidates[0], scores[0]

    def drawn(parent: C, rng: random.Random) -> list[C]:
        found, seen = [], {name(parent)}
        for _ in range(TRIES * offspring):
            child = mutate(parent, rng)
            if (key := name(child)) not in seen:
                seen.add(key)
                found.append(child)
                if len(found) == offspring:
                    break
        return found

    start = [name(candidate) for candidate in parents]
    if journal is not None:
        settings = [seed, offspring, survivors, start]
        if "search" not in journal:
            journal.put("search", settings)
        elif journal["search"] != settings:
            raise SmeltError("search: the journal is that of a search with other candidates or settings; delete it to begin anew")
    parent: tuple[C, float] | None = None
    history = []
    for generation in range(generations + 1):
        key = f"generation {generation}"
        if journal is not None and key in journal:
            parent = decode(journal[key]["candidate"]), float(journal[key]["fitness"])
        else:
            rng = random.Random(f"{seed}/{generation}")
            parent = best(list(parents) if parent is None else drawn(parent[0], rng), parent)
            if journal is not None:
                journal.put(key, {"candidate": encode(parent[0]), "fitness": parent[1]})
        history.append(parent[1])
        if each is not None:
            each(generation, *parent)
    assert parent is not None
    return Evolved(*parent, history, calls)
