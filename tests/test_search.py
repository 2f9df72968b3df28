"""Searching recipes under a budget: what a budget says, the optimum by brute force, kill and resume, one real run."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from smelt import pipeline, preflight, report
from smelt._report_words import verdict
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.pipeline import Point
from smelt.recipe import read
from smelt.search import TERMS, Candidate, Search, front, objective, parse, ratios_of, search
from smelt.spec import Metric, SmeltError

PROBES = "[perplexity(tokens=256, document=128, context=64, stride=32, prefill=8, chunk=4), memory(tokens=32), latency(prompt=16, new=4)]"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny model and a little text."""
    folder = tmp_path_factory.mktemp("search")
    save(tiny("llama", layers=2), tiny_tokenizer(), folder / "tiny")
    chance = random.Random(0)
    for n in range(40):
        (folder / f"text{n}.txt").write_text(" ".join(chance.choice(["def", "x", "return", "pass", "for", "\n"]) for _ in range(300)))
    return folder


def recipe(place: Path, stages: str, more: str = "", evaluate: str = PROBES):
    text = f"name: found\nmodel: {place}/tiny\ndata: {place}/text*.txt\nstages:\n{stages}evaluate: {evaluate}\n{more}"
    return read("r.yaml", text=text)


CACHES = "  - cache: [none, sink_window(window=16), sink_window(window=32), sink_window(window=64)]\n"
ATTENTION = "  - attention: [none, top_k(keep=4), top_k(keep=8), top_k(keep=16)]\n"


# the budget


def test_a_budget_is_read():
    bounds = parse("memory<=0.5, quality >= 9.7e-1,top1_agreement>=0.9")
    assert [(b.term.name, b.term.metric, b.limit) for b in bounds] == [
        ("memory", "peak_bytes", 0.5),
        ("quality", "bits_per_byte", 0.97),
        ("top1_agreement", "top1_agreement", 0.9),
    ]
    assert ",".join(b.text for b in bounds) == "memory<=0.5,quality>=0.97,top1_agreement>=0.9"


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        ("", "nothing is bounded"),
        (" , ", "nothing is bounded"),
        ("memory", "'memory' is not of the form name<=number"),
        ("memory<=0.5;quality>=1", "'0.5;quality>=1' is not a number above 0"),
        ("memory<=0.5,", "'' is not of the form"),
        ("memory=<0.5", "bounds are <= or >=; write memory<=0.5"),
        ("memory<0.5", "bounds are <= or >=; write memory<=0.5"),
        ("quality=0.9", "bounds are <= or >=; write quality>=0.9"),
        ("quality<=0.9", "of quality, higher is better; write quality>=0.9"),
        ("latency>=2", "of latency, lower is better; write latency<=2"),
        ("memory<=half", "'half' is not a number above 0"),
        ("memory<=-1", "'-1' is not a number above 0"),
        ("memory<=nan", "'nan' is not a number above 0"),
        ("memory<=0.5,memory<=0.4", "'memory' is bounded twice"),
    ],
)
def test_a_wrong_budget_names_the_term(budget, said):
    with pytest.raises(SmeltError, match=re.escape(said)) as caught:
        parse(budget)
    assert "\n" not in str(caught.value)


def test_objectives():
    assert objective(None, None) is TERMS["quality"] and objective("memory", None) is TERMS["memory"]
    assert objective(None, "loyalty").better == "higher" and objective("kl_to_teacher", None).better == "lower"
    for given, said in (((("decode"), None), "--maximize decode"), ((None, "memory"), "--minimize memory"), (("a", "b"), "one objective")):
        with pytest.raises(SmeltError, match=said):
            objective(*given)


@pytest.mark.parametrize("name", TERMS)
def test_terms_and_how_far_beyond(name):
    """Better than the base is within, worse beyond; an inverse term is base / candidate with its interval turned."""
    term = TERMS[name]
    span = term.of({term.metric: (0.5, 0.4, 0.8)})
    assert span == ((2.0, 1.25, 2.5) if term.inverse else (0.5, 0.4, 0.8)) and span[1] <= span[0] <= span[2]
    bound = parse(f"{name}{term.sign}0.5")[0]
    worse = 1.0 if term.better == "lower" else 0.25
    assert bound.over(0.5) == 0 and bound.over(worse) == pytest.approx(1.0) and bound.over(0.5 * 0.5 / worse) == 0


def test_latency_and_decode_are_the_same_bound():
    fast, slow = parse("latency<=0.5")[0], parse("decode>=2")[0]
    for ratio in (0.5, 1.0, 1.9, 2.0, 3.0):
        assert fast.over(1 / ratio) == pytest.approx(slow.over(ratio))


# the recipe


def test_none_is_for_searching_only(place):
    found = recipe(place, CACHES + "  - weights: [magnitude(sparsity=0.5), none]\n")
    assert [(s.optional, len(s.methods)) for s in found.stages] == [(True, 3), (True, 1)]
    for refused in (lambda: pipeline.run(found, folder=place / "runs"), lambda: preflight.plan(found, {})):
        with pytest.raises(SmeltError, match=r"r.yaml:5: cache: 'none' leaves the stage out, which only `smelt search` tries"):
            refused()
    for text, said in (("[none]", "the list is empty"), ("none", "no method 'none'")):
        with pytest.raises(SmeltError, match=said):
            recipe(place, f"  - cache: {text}\n")
    with pytest.raises(SmeltError, match="no method 'none'"):
        recipe(place, CACHES, evaluate="[none, memory]")


@pytest.mark.parametrize(
    ("stages", "more", "budget", "said"),
    [
        (CACHES, "expect:\n  - base.perplexity <= 1\n", "quality>=1", "'none' leaves the stage out"),
        ("  - cache: [kivi(bits=2), kivi(bits=4)]\n", "expect:\n  - base.perplexity <= 1\n", "quality>=1", "a budget where a claim has"),
        (CACHES, "seeds: 3\n", "quality>=1", "takes one seed"),
        ("  - cache: kivi(bits=2)\n", "", "quality>=1", "there is nothing to choose"),
        (CACHES, "", "qualty>=1", "nothing measured is called 'qualty'; did you mean 'quality'"),
        (CACHES, "", "perplexity>=1", "of perplexity, lower is better"),
    ],
)
def test_what_cannot_be_searched(place, stages, more, budget, said):
    with pytest.raises(SmeltError, match=re.escape(said)):
        search(recipe(place, stages, more), budget, folder=place / "runs")


def test_a_term_needs_its_probe(place):
    with pytest.raises(SmeltError, match="'decode' is measured by the probe latency; add it"):
        search(recipe(place, CACHES, evaluate="[perplexity]"), "decode>=1", folder=place / "runs")
    with pytest.raises(SmeltError, match="'quality' is measured by the probe perplexity"):
        search(recipe(place, CACHES, evaluate="[memory]"), "memory<=1", folder=place / "runs")


def test_candidates_have_names_of_their_own(place):
    stages = "  - weights: [none, magnitude(sparsity=0.5)]\n  - weights: [none, magnitude(sparsity=0.5), wanda(sparsity=0.25)]\n"
    for text in (CACHES + ATTENTION, stages):
        work = Search(recipe(place, text), parse("quality>=1"), TERMS["quality"], 64, place / "runs", {})
        names = [work.name(choice) for choice in itertools.product(*work.choices)]
        assert len(set(names)) == len(names) == work.size and names[0] == "base"


# a synthetic landscape


def landscape(recipe, seed):
    """Random log-ratios per stage and choice, summed, with a term for each pair of stages: {choice: {metric: ratio}}."""
    chance = random.Random(seed)
    options = [[-1] * s.optional + list(range(len(s.methods))) for s in recipe.stages]
    single = {(at, i): [chance.uniform(-0.6, 0.2) * (i >= 0) for _ in range(2)] for at, o in enumerate(options) for i in o}
    pairs = {
        (a, i, b, j): chance.uniform(-0.1, 0.1) * (i >= 0 and j >= 0)
        for a, b in itertools.combinations(range(len(options)), 2)
        for i in options[a]
        for j in options[b]
    }
    found = {}
    for choice in itertools.product(*options):
        memory = sum(single[at, i][0] for at, i in enumerate(choice))
        loss = -sum(single[at, i][0] * 0.3 + min(0, single[at, i][1]) * 0.3 for at, i in enumerate(choice))
        loss += sum(pairs[a, choice[a], b, choice[b]] for a, b in itertools.combinations(range(len(options)), 2))
        found[choice] = {"peak_bytes": math.exp(memory), "bits_per_byte": math.exp(loss)}
    return found


def synthetic(monkeypatch, table, calls=None):
    def figures(self, choice):
        if calls is not None:
            calls.append(choice)
        ends = [("base", {"peak_bytes": 1.0, "bits_per_byte": 1.0}), ("end", table[choice])]
        rows = [
            {"name": n, "text": n, "kind": "cache", "parent": None, "metrics": {m: {"value": v, "better": "lower"} for m, v in f.items()}}
            for n, f in ends[: 1 if all(at < 0 for at in choice) else 2]
        ]
        points = tuple(Point(row["name"], row["name"], "cache", Path("/elsewhere"), "", None) for row in rows)
        return {"name": "found", "variants": rows, "ratios": [], "stages": [], "refusals": []}, points

    monkeypatch.setattr(Search, "figures", figures)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("budget", ["memory<=0.6", "memory<=0.5,quality>=0.9", "memory<=0.01"])
@pytest.mark.parametrize("aim", ["quality", "memory"])
def test_a_small_space_is_enumerated_and_exact(place, tmp_path, monkeypatch, seed, budget, aim):
    found = recipe(place, CACHES + ATTENTION, evaluate="[perplexity, memory]")
    table = landscape(found, seed)
    synthetic(monkeypatch, table)
    work = Search(found, parse(budget), TERMS[aim], 64, tmp_path, {})
    results = work.everything()
    told = results["search"]

    def beyond(row):
        quality = 1 / row["bits_per_byte"]
        limits = dict(re.split("<=|>=", part) for part in budget.split(","))
        over = max(0.0, row["peak_bytes"] / float(limits["memory"]) - 1)
        return over + (max(0.0, float(limits["quality"]) / quality - 1) if "quality" in limits else 0.0)

    metric = {"quality": "bits_per_byte", "memory": "peak_bytes"}[aim]  # the smaller, the better
    best = min(table, key=lambda choice: (beyond(table[choice]), table[choice][metric]))
    assert told["exact"] and told["paths"] == len(told["candidates"]) == len(table) == 16
    assert tuple(told["candidates"][0]["choice"]) == best and told["best"] == work.name(best) == results["headline"]["to"]
    assert told["feasible"] == (beyond(table[best]) == 0)
    undominated = {a for a in table if not any(table[b] != table[a] and all(table[b][m] <= table[a][m] for m in table[a]) for b in table)}
    assert {tuple(c["choice"]) for c in told["candidates"] if c["front"]} == undominated
    assert {v["name"] for v in results["variants"]} == {"base"} | {work.name(c) for c in undominated}
    assert json.loads((tmp_path / "results.json").read_text())["search"] == json.loads(json.dumps(told))
    said = verdict(results)
    assert ("within" in said) == told["feasible"] and ("No path keeps to" in said) != told["feasible"] and work.name(best) in said


@pytest.mark.parametrize("seed", range(5))
def test_a_large_space_is_searched(place, tmp_path, monkeypatch, seed):
    """256 paths, at most 100 measured: within 1 % of the optimum by brute force, and twice the same."""
    decode = "  - decode: [none, prompt_lookup(tokens=2), prompt_lookup(tokens=3), prompt_lookup(tokens=4)]\n"
    weights = "  - weights: [none, rtn(bits=8), rtn(bits=4), rtn(bits=3)]\n"
    found = recipe(place, weights + CACHES + ATTENTION + decode, f"seed: {seed}\n", evaluate="[perplexity, memory]")
    table, runs = landscape(found, seed), []
    for folder in ("a", "b"):
        calls: list = []
        synthetic(monkeypatch, table, calls)
        work = Search(found, parse("memory<=0.5"), TERMS["quality"], 100, tmp_path / folder, {})
        told = work.everything()["search"]
        assert len(calls) == len(set(calls)) == len(told["candidates"]) <= 100 and not told["exact"] and told["paths"] == 256
        runs.append(told)
    assert runs[0] == runs[1]
    best = min(row["bits_per_byte"] for row in table.values() if row["peak_bytes"] <= 0.5)
    assert runs[0]["feasible"] and table[tuple(runs[0]["candidates"][0]["choice"])]["bits_per_byte"] <= 1.01 * best


def test_a_path_that_cannot_be_taken_is_said(place, tmp_path, monkeypatch):
    found = recipe(place, CACHES, evaluate="[perplexity, memory]")
    synthetic(monkeypatch, landscape(found, 0))
    plain = Search.figures

    def figures(self, choice):
        if choice == (1,):
            raise SmeltError("does not fit")
        return plain(self, choice)

    monkeypatch.setattr(Search, "figures", figures)
    results = Search(found, parse("memory<=5"), TERMS["quality"], 64, tmp_path, {}).everything()
    assert results["refusals"] == ["sink_window(window=32): does not fit"] and len(results["search"]["candidates"]) == 3
    assert "3 of 4 paths were measured, the others cannot be taken" in verdict(results)


# measuring


def counted(monkeypatch, stop=0):
    """A measure() that invents figures from what was measured and counts; at call `stop` it is killed."""
    calls: list = []

    def opener(self, point, loaded):
        return SimpleNamespace(name=point.name, key="base" if point.parent is None else point.key)

    def measure(factories, probes, progress=None, **more):
        if len(calls) + 1 == stop:
            raise KeyboardInterrupt
        calls.append((tuple(f.key for f in factories), type(probes[0]).__name__))
        made = {}
        for factory in factories:
            value = 1.0 if factory.key == "base" else random.Random(factory.key + type(probes[0]).__name__).uniform(0.5, 1.5)
            metrics = {"Perplexity": "bits_per_byte", "Memory": "peak_bytes", "Latency": "decode_tokens_per_s"}
            better = "higher" if type(probes[0]).__name__ == "Latency" else "lower"
            made[factory.name] = [Metric(metrics[type(probes[0]).__name__], value, "", better, (value, value))]
        return made

    monkeypatch.setattr(pipeline, "measure", measure)
    monkeypatch.setattr(pipeline.Run, "opener", opener)
    return calls


@pytest.mark.parametrize("most", [64, 9])
def test_a_killed_search_measures_nothing_twice(place, tmp_path, monkeypatch, most):
    found = recipe(place, CACHES + ATTENTION)
    budget = "memory<=0.8,latency<=1.2"
    calls = counted(monkeypatch)
    whole = search(found, budget, most=most, folder=tmp_path / "whole")[0]["search"]
    assert len(set(calls)) == len(calls)
    assert (len(whole["candidates"]) == 16) == (most == 64) and len(whole["candidates"]) <= most
    for stop in (5, 16):
        folder, before = tmp_path / f"at{stop}", counted(monkeypatch, stop)
        with pytest.raises(KeyboardInterrupt):
            search(found, budget, most=most, folder=folder)
        after = counted(monkeypatch)
        assert search(found, budget, most=most, folder=folder)[0]["search"] == whole
        assert sorted(before + after) == sorted(calls)
    again = counted(monkeypatch)
    assert search(found, "memory<=0.7", folder=tmp_path / "whole", most=most)[0]["search"]["budget"] == "memory<=0.7"
    assert not set(again) & set(calls)


def test_times_are_taken_beside_the_base(place, tmp_path, monkeypatch):
    calls = counted(monkeypatch)
    search(recipe(place, CACHES), "decode>=1", folder=tmp_path)
    timed = [names for names, probe in calls if probe == "Latency"]
    assert len(timed) == 4 and all(names[0] == "base" and len(names) <= 2 for names in timed)


def test_a_real_search(place, tmp_path, monkeypatch):
    """Two stages on a tiny model: figures are those of the run, the checkpoint is delivered, another budget is free."""
    stages = "  - weights: [none, rtn(bits=8, group=32), rtn(bits=4, group=32)]\n    calibrate: {rows: 2, context: 32}\n"
    stages += "  - cache: [none, sink_window(sinks=2, window=16)]\n"
    found = recipe(place, stages, evaluate=PROBES.replace(", latency(prompt=16, new=4)", ""))
    results, root = search(found, "disk<=0.9,quality>=0.5", minimize="disk", folder=tmp_path)
    told = results["search"]
    assert told["exact"] and told["paths"] == 6 and told["feasible"] and told["best"].startswith("rtn(")
    weights = [sum(f.stat().st_size for f in folder.glob("*.safetensors")) for folder in (place / "tiny", root / "model")]
    assert told["candidates"][0]["values"]["disk"][0] == pytest.approx(weights[1] / weights[0]) and weights[1] < weights[0]
    base, *others = results["variants"]
    for row in others:
        figures = next(c for c in told["candidates"] if c["name"] == row["name"])["values"]
        bits = base["metrics"]["bits_per_byte"]["value"], row["metrics"]["bits_per_byte"]["value"]
        assert figures["quality"][0] == pytest.approx(bits[0] / bits[1])
    assert next(c for c in told["candidates"] if c["name"] == "base")["values"]["quality"][0] == 1
    page = (root / "report.html").read_text()
    assert "The search" in page and "<svg" in page and (root / "model" / "README.md").is_file()
    out = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    out.print(report.front(results, root / "report.html"))
    assert told["best"] in out.export_text()
    out.file.close()
    monkeypatch.setattr(pipeline, "measure", lambda *args, **more: pytest.fail("measured again"))
    other, _ = search(found, "memory<=0.0001", folder=tmp_path)
    assert not other["search"]["feasible"] and not (root / "model").exists()
    assert "No path keeps to memory&lt;=0.0001" in (root / "report.html").read_text()


def test_the_way_to_the_best_is_told(place, tmp_path, monkeypatch):
    """A path of two stages: the model card names both, though only its end was measured."""
    counted(monkeypatch)
    stages = (
        "  - weights: magnitude(sparsity=0.5)\n    calibrate: {rows: 2, context: 32}\n  - cache: [kivi(bits=4), sink_window(window=8)]\n"
    )
    results, root = search(recipe(place, stages), "memory<=9", folder=tmp_path)
    assert [s["name"] for s in results["stages"]] == ["magnitude", results["search"]["best"]]
    card = (root / "model" / "README.md").read_text()
    assert "magnitude(sparsity=0.5)" in card and re.search(r'cache="(kivi|sink_window)', card)


def test_front_and_ratios():
    results = {
        "variants": [
            {"name": "base", "metrics": {"a": {"value": 2.0}, "zero": {"value": 0.0}, "only": {"value": 1.0}}},
            {"name": "end", "metrics": {"a": {"value": 3.0}, "b": {"value": 1.0}, "zero": {"value": 1.0}}},
        ],
        "ratios": [{"a": "end", "b": "other", "metric": "a", "median": 9.0, "low": 9.0, "high": 9.0}],
    }
    assert ratios_of(results) == {"a": (1.5, 1.5, 1.5)}
    results["ratios"].append({"a": "end", "b": "base", "metric": "a", "median": 1.4, "low": 1.3, "high": 1.6})
    assert ratios_of(results) == {"a": (1.4, 1.3, 1.6)}
    rows = [Candidate((i,), str(i), {}, 0.0, costs, {}, ()) for i, costs in enumerate([(1, 2), (1, 3), (2, 1), (1, 2), (3, 3)])]
    assert [row.name for row in front(rows)] == ["0", "2", "3"]  # as good in one and better in the other beats; equals do not
    assert front([]) == []
