"""The best path through a recipe within a budget: `smelt search recipe.yaml --budget "memory<=0.5,quality>=0.97"`.

    budget: every term a ratio to the base      candidate: one method of each stage, or `none` where its list has it
    fitness: (sum of max(0, overrun), objective)  front: candidates to which no other is as good in all and better in one

`run` takes every path of a recipe with lists, `search` as many as `most` allows: all of them where they are no more
than that (exact), else those that an evolutionary search asks for. A candidate is a recipe without forks, run in the
store all share, so stages and figures that paths have in common are made once, and a killed search goes on where it was:
stages and figures by digest, candidates and generations in a journal. Times are measured beside the base in turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import random
import re
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smelt import registry, report
from smelt._pipeline_files import disk_errors, write_json, write_text
from smelt._pipeline_machine import quiet
from smelt.evolution import evolve
from smelt.journal import Journal
from smelt.pipeline import Point, Run, block, digest, spine
from smelt.preflight import plan
from smelt.progress import note
from smelt.recipe import Recipe, recipe_of, shipped
from smelt.spec import SmeltError, nearest

__all__ = ["TERMS", "Bound", "Candidate", "Search", "Term", "front", "parse", "search"]

OFFSPRING = 4  # of a generation; the first has up to FIRST candidates
FIRST = 8
Choice = tuple[int, ...]  # per stage the method taken, -1 for none
Span = tuple[float, float, float]  # ratio to the base with its interval


@dataclass(frozen=True)
class Term:
    """A figure as a ratio to the base's: candidate / base of `metric`, or base / candidate with `inverse`."""

    name: str
    metric: str
    better: str  # "lower": bounded by <=; "higher": by >=
    inverse: bool = False
    probe: str = ""  # that measures it

    @property
    def sign(self) -> str:
        return "<=" if self.better == "lower" else ">="

    def of(self, ratios: dict[str, Span]) -> Span:
        middle, low, high = ratios[self.metric]
        return (_inverse(middle), _inverse(high), _inverse(low)) if self.inverse else (middle, low, high)

    def cost(self, value: float) -> float:
        """The same figure, lower better."""
        return value if self.better == "lower" else _inverse(value)


TERMS = {
    term.name: term
    for term in (
        Term("quality", "bits_per_byte", "higher", True, "perplexity"),  # 1 is as good as the base
        Term("memory", "peak_bytes", "lower", False, "memory"),  # weights, cache and what a prompt needs at its peak
        Term("weights", "weight_bytes", "lower", False, "memory"),
        Term("cache", "cache_bytes_per_token", "lower", False, "memory"),
        Term("disk", "disk_bytes", "lower"),
        Term("latency", "decode_tokens_per_s", "lower", True, "latency"),  # seconds per token written
        Term("decode", "decode_tokens_per_s", "higher", False, "latency"),
        Term("prefill", "prefill_tokens_per_s", "higher", False, "latency"),
        Term("first_token", "first_token_s", "lower", False, "latency"),
    )
}


@dataclass(frozen=True)
class Bound:
    term: Term
    limit: float

    def over(self, value: float) -> float:
        """How far beyond the limit, as a share of it: 0 within; 1 for twice the memory or half the speed allowed."""
        return max(0.0, self.term.cost(value) / self.term.cost(self.limit) - 1)

    @property
    def text(self) -> str:
        return f"{self.term.name}{self.term.sign}{self.limit:g}"


@dataclass(frozen=True)
class Candidate:
    """A path that was measured. `key` orders candidates, the best first; `costs` are its figures, lower better."""

    choice: Choice
    name: str
    values: dict[str, Span]
    violation: float
    costs: tuple[float, ...]  # objective first
    results: dict[str, Any]  # of the path, as Run.results gives them for base and end
    points: tuple[Point, ...]

    @property
    def key(self) -> tuple[float, float, float, Choice]:
        return self.violation, self.costs[0], sum(self.costs), self.choice  # with the sum, the first is never dominated


def search(
    recipe: str | Path | Recipe | None = None,
    budget: str = "",
    *,
    minimize: str | None = None,
    maximize: str | None = None,
    most: int = 64,
    model: str | None = None,
    data: str | None = None,
    overrides: dict[str, str] | None = None,
    folder: str | Path = "runs",
    store: str | Path | None = None,
    trust_pickle: bool = False,
    trust_remote_code: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Find the best path of a recipe within a budget; returns the results and their folder.

    `results["search"]["feasible"]` says whether a path keeps to the budget; if none does, the one that comes nearest
    is reported. The objective is the best quality unless `minimize` or `maximize` names another term. At most `most`
    candidates are measured. Bounds are held against the ratios as measured: intervals are reported, not subtracted.
    Raises SmeltError for a budget or a recipe that cannot be searched.
    """
    bounds, aim = parse(budget), objective(minimize, maximize)
    if most < 1:
        raise SmeltError(f"most={most}: at least one candidate must be measured")
    if not isinstance(recipe, Recipe):
        recipe = recipe_of(recipe or shipped("recipes") / "search.yaml", model, data, overrides)
    trust = {"trust_pickle": trust_pickle, "trust_remote_code": trust_remote_code}
    work = Search(recipe, bounds, aim, most, Path(folder) / recipe.name, trust, Path(store) if store else None)
    with disk_errors(), work.run(None).locked(), quiet():
        return work.everything(), work.root


# ---------------------------------------------------------------------- the budget


def parse(budget: str) -> tuple[Bound, ...]:
    """`memory<=0.5, quality>=0.97` -> its bounds. A name that is no term is taken for a metric's own."""
    found: list[Bound] = []
    parts = [part.strip() for part in budget.split(",")]
    if not any(parts):
        raise SmeltError("budget: nothing is bounded; write for instance memory<=0.5,quality>=0.97")
    for part in parts:
        match = re.fullmatch(r"([A-Za-z_]\w*)\s*(<=|>=|=<|=>|==|<|>|=)\s*(\S+)", part)
        if match is None:
            raise SmeltError(f"budget: '{part}' is not of the form name<=number or name>=number")
        name, sign, number = match.groups()
        term = TERMS.get(name) or Term(name, name, "lower" if "<" in sign else "higher")
        limit = _number(number)
        if limit is None:
            raise SmeltError(f"budget: '{part}': '{number}' is not a number above 0; terms are ratios to the base, such as 0.5")
        if sign not in ("<=", ">=") or sign != term.sign:
            why = "bounds are <= or >=" if sign not in ("<=", ">=") else f"of {name}, {term.better} is better"
            raise SmeltError(f"budget: '{part}': {why}; write {name}{term.sign}{number}")
        if any(bound.term.name == name for bound in found):
            raise SmeltError(f"budget: '{name}' is bounded twice")
        found.append(Bound(term, limit))
    return tuple(found)


def objective(minimize: str | None, maximize: str | None) -> Term:
    """What counts among those within the budget; the quality unless said."""
    if minimize and maximize:
        raise SmeltError("a search has one objective: minimize or maximize, not both")
    name, better = (minimize, "lower") if minimize else (maximize or "quality", "higher")
    term = TERMS.get(name) or Term(name, name, better)
    if term.better != better:
        right = "maximize" if better == "lower" else "minimize"
        raise SmeltError(f"of {name}, {term.better} is better; write --{right} {name}")
    return term


# ---------------------------------------------------------------------- the search


class Spent(Exception):
    """As many paths were measured as may be."""


class Search:
    """One recipe, one budget, one folder. `everything()` is the whole of `smelt search`."""

    def __init__(
        self, recipe: Recipe, bounds: Sequence[Bound], aim: Term, most: int, root: Path, trust: dict[str, bool], store: Path | None = None
    ):
        self.recipe, self.bounds, self.aim, self.most = recipe, tuple(bounds), aim, most
        self.root, self.store, self.trust = root, store or root, trust
        probes = {registry.name_of(probe)[1] for probe in recipe.evaluate}
        quality = [TERMS["quality"]] * ("perplexity" in probes)
        self.terms = tuple({t.name: t for t in (aim, *(b.term for b in self.bounds), *quality)}.values())
        self.choices: list[list[int]] = [[-1] * s.optional + list(range(len(s.methods))) for s in recipe.stages]
        self.size = math.prod(len(options) for options in self.choices)
        self.rows: dict[Choice, Candidate] = {}
        self.refused: dict[Choice, str] = {}
        self.journal: Journal | None = None
        self.check(probes)

    def check(self, probes: set[str]) -> None:
        recipe = self.recipe
        if recipe.expect:
            raise SmeltError("a search has a budget where a claim has 'expect:'; take that block away", file=recipe.file)
        if len(recipe.seeds) > 1:
            raise SmeltError("a search takes one seed, not several; run what it finds with several", file=recipe.file)
        if self.size == 1:
            raise SmeltError("there is nothing to choose: write a list in a stage, such as cache: [none, kivi(bits=2)]", file=recipe.file)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise SmeltError("a search runs in one process; start it without torchrun")
        for term in self.terms:
            if term.probe and term.probe not in probes:
                raise SmeltError(f"'{term.name}' is measured by the probe {term.probe}; add it to 'evaluate:'", file=recipe.file)

    def everything(self) -> dict[str, Any]:
        began = time.monotonic()
        if any(term.name not in TERMS for term in self.terms):
            self.check_names(self.figures(None)[0]["variants"][0]["metrics"])
        if self.size <= self.most:
            for choice in itertools.product(*self.choices):
                self.measured(choice)
        else:
            self.evolved()
        if not self.rows:
            raise SmeltError(f"no path of this recipe could be measured; the first: {next(iter(self.refused.values()))}")
        return self.deliver(sorted(self.rows.values(), key=lambda row: row.key), began)

    def check_names(self, metrics: dict[str, dict[str, Any]]) -> None:
        """Metrics called by their own names: known only once the base was measured."""
        for term in self.terms:
            if term.name not in TERMS and term.name not in metrics:
                raise SmeltError(f"nothing measured is called '{term.name}'{nearest(term.name, [*TERMS, *metrics])}")
            if term.name not in TERMS and metrics[term.name]["better"] != term.better:
                raise SmeltError(f"of {term.name}, {metrics[term.name]['better']} is better; '{term.name}{term.sign}' asks for the worse")
            if not metrics.get(term.metric, {"value": 1})["value"]:
                raise SmeltError(f"'{term.name}' is 0 for the base, so there is no ratio to it")

    def evolved(self) -> None:
        """A (1 + lambda) search until `most` paths were asked for. The journal names them; their figures lie in the store by digest."""
        rng = random.Random(f"{self.recipe.seed}/parents")
        parents = [tuple(c[0] for c in self.choices), tuple(c[-1] for c in self.choices)][: self.most]
        while len(parents) < min(FIRST, max(1, self.most // 4)):
            drawn = tuple(rng.choice(options) for options in self.choices)
            parents += [drawn] * (drawn not in parents)
        self.journal = Journal(self.store / "search" / f"{self.identity()[:16]}.jsonl")
        for key in list(self.journal.values):
            if key.startswith("candidate "):
                self.measured(tuple(json.loads(key.removeprefix("candidate "))))

        def told(generation: int, parent: Choice, fitness: float) -> None:
            note(f"generation {generation}: {self.name(parent)}, {'within the budget' if fitness <= 1 else 'beyond the budget'}")

        with contextlib.suppress(Spent):
            evolve(
                parents, self.mutate, lambda choice, _: self.fitness(choice), offspring=OFFSPRING, survivors=[1],
                generations=self.most, seed=self.recipe.seed, journal=self.journal, decode=tuple, each=told,
            )  # fmt: skip

    def mutate(self, choice: Choice, rng: random.Random) -> Choice:
        """Another choice in one stage, at times in two: a neighbour in its list or any other."""
        open_ = [at for at, options in enumerate(self.choices) if len(options) > 1]
        changed = list(choice)
        for at in rng.sample(open_, min(len(open_), 2 if rng.random() < 0.25 else 1)):
            options = self.choices[at]
            place = options.index(choice[at])
            near = [i for i in (place - 1, place + 1) if 0 <= i < len(options)]
            changed[at] = options[rng.choice(near if rng.random() < 0.5 else [i for i in range(len(options)) if i != place])]
        return tuple(changed)

    def fitness(self, choice: Choice) -> float:
        """(violation, objective) as one number: the overrun in millionths counts first, the objective lies within [0, 1]."""
        if len(self.rows) + len(self.refused) >= self.most and choice not in self.rows and choice not in self.refused:
            raise Spent
        row = self.measured(choice)
        if row is None or math.isinf(row.violation):
            return math.inf
        first = row.costs[0]
        return 2 * math.ceil(1e6 * row.violation) + (1.0 if math.isinf(first) else first / (1 + first))

    def measured(self, choice: Choice) -> Candidate | None:
        """The candidate with its figures; None for a path that cannot be taken, whose reason is kept."""
        if choice in self.rows or choice in self.refused:
            return self.rows.get(choice)
        name = self.name(choice)
        note(f"candidate {len(self.rows) + len(self.refused) + 1} of at most {min(self.size, self.most)}: {name}")
        try:
            results, points = self.figures(choice)
            ratios = ratios_of(results)
            missing = [term.name for term in self.terms if term.metric not in ratios]
            if missing:
                raise SmeltError("; ".join(results["refusals"]) or f"no figure for {', '.join(missing)}")
        except SmeltError as error:
            self.refused[choice] = error.message
            self.remember(choice)
            note(f"  cannot be taken: {error.message}")
            return None
        values = {term.name: term.of(ratios) for term in self.terms}
        violation = sum(bound.over(values[bound.term.name][0]) for bound in self.bounds)
        costs = tuple(term.cost(values[term.name][0]) for term in self.terms)
        row = self.rows[choice] = Candidate(choice, name, values, violation, costs, results, points)
        self.remember(choice)
        said = ", ".join(f"{key} {span[0]:.3g}" for key, span in values.items())
        note(f"  {said}; {'beyond' if violation else 'within'} the budget")
        return row

    def remember(self, choice: Choice) -> None:
        if self.journal is not None and (key := f"candidate {json.dumps(choice)}") not in self.journal:
            self.journal.put(key, self.name(choice))

    def figures(self, choice: Choice | None) -> tuple[dict[str, Any], tuple[Point, ...]]:
        """Make the path, or find it made, and measure its end beside the base. None: the base alone."""
        work = self.run(choice)
        plan(work.recipe, self.trust)
        points = work.points()
        pair = [points[0], *(dataclasses.replace(p, parent=points[0].name) for p in points[1:][-1:])]
        return work.results(pair, work.figures(pair)), tuple(points)

    # ------------------------------------------------------------------ candidates

    def run(self, choice: Choice | None) -> Run:
        stages = () if choice is None else tuple(
            dataclasses.replace(stage, methods=(stage.methods[at],), optional=False)
            for stage, at in zip(self.recipe.stages, choice, strict=True)
            if at >= 0
        )  # fmt: skip
        return Run(dataclasses.replace(self.recipe, stages=stages), self.root, store=self.store, **self.trust)

    def words(self) -> list[dict[int, str]]:
        """Per stage what each choice is called: the bare name of a method where only one of the stage has it."""
        bare = [[registry.name_of(m)[1] for m in stage.methods] for stage in self.recipe.stages]
        return [
            {-1: ""} | {i: n if names.count(n) == 1 else registry.text(stage.methods[i]).removesuffix("()") for i, n in enumerate(names)}
            for stage, names in zip(self.recipe.stages, bare, strict=True)
        ]

    def name(self, choice: Choice) -> str:
        words = self.words()
        said = [w for stage in words for w in stage.values() if w]
        empty = "none" if len(set(said)) < len(said) else ""  # a method in two stages: say which one was left out
        parts = [stage[at] or empty for stage, at in zip(words, choice, strict=False)]
        return "base" if all(at < 0 for at in choice) else ".".join(filter(None, parts))

    def identity(self) -> str:
        """Of the search: a changed method, model, text, budget or size begins a new one."""
        stages = [
            [s.kind, s.optional, [registry.text(m) + registry.source_digest(m) for m in s.methods]]
            + [[block(b), str(getattr(b, "teacher", ""))] for b in (s.train, s.calibrate) if b is not None]
            for s in self.recipe.stages
        ]
        probes = [registry.text(p) + registry.source_digest(p) for p in self.recipe.evaluate]
        code = [spine("compress"), spine("train")] if any(s.train or s.calibrate for s in self.recipe.stages) else []
        budget = [sorted(bound.text for bound in self.bounds), self.aim.name, self.aim.better, self.most]
        base = self.run(None).base().key
        return digest("search", base, self.recipe.seed, self.recipe.data.digest(), stages, probes, code, budget)

    # ------------------------------------------------------------------ what is left behind

    def deliver(self, rows: list[Candidate], began: float) -> dict[str, Any]:
        """results.json and report.html, and model/ where the best keeps to the budget and has a checkpoint of its own."""
        best, shown = rows[0], front(rows)
        variants, ratios = [best.results["variants"][0]], []
        for row in dict.fromkeys([best.choice, *(r.choice for r in shown)]):
            candidate = self.rows[row]
            if len(candidate.points) == 1:
                continue
            between = [{"name": p.name, "kind": p.kind, "text": p.text, "folder": self.said(p)} for p in candidate.points[1:-1]]
            told = {"name": candidate.name, "parent": "base", "through": between}
            variants.append(candidate.results["variants"][-1] | told)
            ratios += [r | {"a": candidate.name} for r in candidate.results["ratios"] if r["b"] == "base"]
        stages = [dict(s) for s in best.results["stages"]]
        for stage in stages[-1:]:
            stage["name"] = best.name
        results = best.results | {
            "headline": {"from": "base", "to": best.name},
            "variants": variants,
            "ratios": ratios,
            "stages": stages,
            "warnings": [f"{s['name']}: {w}" for s in stages for w in s["warnings"]],
            "refusals": [f"{self.name(choice)}: {why}" for choice, why in self.refused.items()],
            "seconds": time.monotonic() - began,
            "expect": [],
            "search": self.summary(rows, shown),
        }
        end = dataclasses.replace(best.points[-1], name=best.name)
        if best.violation == 0 and end.folder.is_relative_to(self.store):
            self.run(best.choice).deliver(results, [best.points[0], end])
        else:
            shutil.rmtree(self.root / "model", ignore_errors=True)  # an earlier search's, which this page does not speak of
            write_json(self.root / "results.json", results)
            write_text(self.root / "report.html", report.html(results))
        return results

    def summary(self, rows: list[Candidate], shown: list[Candidate]) -> dict[str, Any]:
        """`results["search"]`: all that the page and the terminal say of the search."""
        limits = {bound.term.name: bound.limit for bound in self.bounds}
        return {
            "budget": ",".join(bound.text for bound in self.bounds),
            "objective": self.aim.name,
            "terms": [dataclasses.asdict(term) | {"limit": limits.get(term.name)} for term in self.terms],
            "paths": self.size,
            "exact": self.size <= self.most,
            "feasible": rows[0].violation == 0,
            "best": rows[0].name,
            "refused": len(self.refused),
            "candidates": [
                {
                    "name": row.name, "choice": list(row.choice), "front": row in shown, "violation": _finite(row.violation),
                    "values": {key: [_finite(v) for v in span] for key, span in row.values.items()},
                }
                for row in rows
            ],
        }  # fmt: skip

    def said(self, point: Point) -> str:
        return os.path.relpath(point.folder, self.root) if point.folder.is_relative_to(self.store) else str(point.folder)


# ---------------------------------------------------------------------- helpers


def front(rows: Iterable[Candidate]) -> list[Candidate]:
    """Those to which no other is at least as good in every figure and better in one, in the order given."""
    rows = list(rows)

    def beats(a: Candidate, b: Candidate) -> bool:
        return a.costs != b.costs and all(x <= y for x, y in zip(a.costs, b.costs, strict=True))

    return [row for row in rows if not any(beats(other, row) for other in rows)]


def ratios_of(results: dict[str, Any]) -> dict[str, Span]:
    """{metric: ratio of the end to the base with its interval}; what has no samples has none."""
    first, last = results["variants"][0], results["variants"][-1]
    found: dict[str, Span] = {}
    for metric, figure in last["metrics"].items():
        base = first["metrics"].get(metric, {}).get("value")
        if base:
            found[metric] = (figure["value"] / base,) * 3
    for row in results["ratios"]:
        if (row["a"], row["b"]) == (last["name"], first["name"]):
            found[row["metric"]] = (row["median"], row["low"], row["high"])
    return {metric: span for metric, span in found.items() if all(map(math.isfinite, span))}


def _inverse(value: float) -> float:
    return 1 / value if value else math.inf


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None
