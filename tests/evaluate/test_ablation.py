"""Ranks against the counted definition and a closed form; a planted proxy is found; what is missing is named."""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from smelt.evaluate._ablation import ablation, spearman
from smelt.recipe import read, shipped, variants
from smelt.spec import SmeltError


def script():
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "data_ablation.py"
    spec = importlib.util.spec_from_file_location("data_ablation_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(4))
def test_spearman_equals_the_closed_form(seed):
    a, b = np.random.default_rng(seed).normal(size=(2, 9))
    rank = [[sum(other <= value for other in row) for value in row] for row in (a, b)]
    n, far = 9, sum((x - y) ** 2 for x, y in zip(*rank))
    assert spearman(a, b) == pytest.approx(1 - 6 * far / (n * (n * n - 1)))
    assert spearman(a, np.exp(a)) == pytest.approx(1) and spearman(a, -a) == pytest.approx(-1)


def test_equal_values_share_their_ranks():
    assert spearman([1, 1, 2], [1.5, 1.5, 3]) == pytest.approx(1)
    assert spearman([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))  # ranks 1.5 1.5 3 against 1 2 3
    assert math.isnan(spearman([1, 1, 1], [1, 2, 3]))


def table(seeds=2):
    draw = np.random.default_rng(0)
    units = {frozenset([part]): draw.normal(3, 1, seeds).tolist() for part in "abcd"}
    pairs = [frozenset(pair) for pair in itertools.combinations("abcd", 2)]
    means = {pair: np.mean([units[frozenset([part])] for part in pair], 0) for pair in pairs}
    return units, means


def test_planted_rankings_are_found():
    units, means = table()
    below = {pair: (value - 0.1).tolist() for pair, value in means.items()}
    against = {pair: (-value).tolist() for pair, value in means.items()}
    found = ablation(units, below, against)
    assert found.merged == pytest.approx([-1, -1]) and found.single == pytest.approx([-1, -1])
    assert (found.below, found.pairs) == (12, 12)
    worse = below | {frozenset("ab"): [9.0, 9.0]}
    found = ablation(units, worse, {pair: value.tolist() for pair, value in means.items()})
    assert found.single == pytest.approx([1, 1]) and all(r < 1 for r in found.merged) and found.below == 10


def test_what_is_missing_is_named():
    units, means = table()
    unions = {pair: value.tolist() for pair, value in means.items()}
    with pytest.raises(SmeltError, match="the average of a \\+ b has not the seeds"):
        ablation(units, {pair: value for pair, value in unions.items() if pair != frozenset("ab")}, unions)
    with pytest.raises(SmeltError, match="the unit of d has not the seeds"):
        ablation({key: value for key, value in units.items() if key != frozenset("d")}, unions, unions)
    with pytest.raises(SmeltError, match="2 mixtures are no ranking"):
        ablation(units, unions, dict(list(unions.items())[:2]))


def test_the_script_reads_the_parts_from_the_recipes_names():
    module = script()
    units, merged = module.losses(results("data_ablation"))
    unions, none = module.losses(results("data_ablation_unions"))
    assert (
        not none and len(units) == 4 and set(unions) == {frozenset(pair) for pair in itertools.combinations([*itertools.chain(*units)], 2)}
    )
    assert set(merged) == {*unions, *[key for key in units if key != frozenset(["asyncio"])]}  # three merged with themselves
    both = frozenset(["email", "xml"])
    assert merged[both] == [10.5, 11.5]  # the mean of the two orders
    assert ablation(units, merged, unions).pairs == 12


def results(recipe):
    """As a run writes them, two seeds; what starts from the unit of `xml` has one more."""
    found = []
    for variant in variants(read(shipped("recipes") / f"{recipe}.yaml")):
        value = 10.0 + variant.name.startswith("ddk(domains=(stdlib(packages=('xml'")
        found.append({"name": variant.name, "metrics": {"bits_per_byte": {"seeds": [value, value + 1]}}})
    return {"variants": found}
