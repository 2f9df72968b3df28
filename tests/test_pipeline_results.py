"""The helper smelt/_pipeline_results.py."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from smelt._pipeline_results import as_metric, over_seeds, ratios
from smelt.spec import Metric


def metric(value, *samples):
    return Metric("m", value, "x", "lower", samples, (1.0,) * len(samples))


def test_every_variant_is_set_over_the_base_its_parent_and_the_first_of_its_fork():
    points = [
        SimpleNamespace(name="base", parent=None, kind="model"),
        SimpleNamespace(name="a", parent="base", kind="weights"),
        SimpleNamespace(name="b", parent="base", kind="weights"),
        SimpleNamespace(name="c", parent="b", kind="cache"),
    ]
    found = {"base": [metric(2.0, 2.0, 2.0)], "a": [metric(4.0, 4.0, 4.0)], "b": [metric(1.0, 1.0, 1.0)], "c": [metric(0.5, 0.5, 0.5)]}
    pairs = {(r["a"], r["b"]): r["median"] for r in ratios(points, found)}
    assert pairs == {("a", "base"): 2.0, ("b", "base"): 0.5, ("b", "a"): 0.25, ("c", "base"): 0.25, ("c", "b"): 0.5}
    found["base"] = [metric(0.0, 0.0, 0.0)]
    assert all(r["b"] != "base" for r in ratios(points, found))  # over nothing there is no ratio


def test_seeds_become_means_with_their_spread_and_ratios_with_their_range():
    def run(seed, value, ratio):
        row = {"name": "a", "metrics": {"m": {"value": value, "unit": "x", "better": "lower"}}}
        base = {"a": "a", "b": "base", "metric": "m"}
        return {"seed": seed, "variants": [row], "ratios": [{**base, "median": ratio}], "stages": [seed], "warnings": ["w"], "refusals": []}

    merged = over_seeds([run(0, 1.0, 0.9), run(1, 2.0, 1.1), run(2, 6.0, 1.0)])
    figure = merged["variants"][0]["metrics"]["m"]
    assert figure["value"] == 3.0 and figure["seeds"] == [1.0, 2.0, 6.0] and figure["spread"] == pytest.approx(7**0.5)
    assert merged["ratios"] == [{"a": "a", "b": "base", "metric": "m", "median": 1.0, "low": 0.9, "high": 1.1}]
    assert merged["seeds"] == [0, 1, 2] == merged["stages"] and merged["warnings"] == ["w"]


def test_a_metric_survives_json():
    one = metric(2.0, 1.0, 3.0)
    assert as_metric({**one._asdict(), "samples": list(one.samples), "weights": list(one.weights)}) == one
