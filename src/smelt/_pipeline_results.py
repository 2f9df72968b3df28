"""Figures of many variants and many seeds as one result."""

from __future__ import annotations

import math
from typing import Any

from smelt.evaluate._measure import ratio
from smelt.spec import Metric

__all__ = ["as_metric", "over_seeds", "ratios"]


def ratios(points: list[Any], found: dict[str, list[Metric]]) -> list[dict[str, Any]]:
    """Every variant over the base, over its parent, and over the first branch of its fork."""
    pairs: list[tuple[str, str]] = []
    first: dict[tuple[str, str], str] = {}
    for point in points:
        if point.parent is None:
            continue
        sibling = first.setdefault((point.parent, point.kind), point.name)
        for other in dict.fromkeys([points[0].name, point.parent, sibling]):
            if other != point.name:
                pairs.append((point.name, other))
    rows = []
    for a, b in pairs:
        theirs = {m.name: m for m in found[b]}
        for metric in found[a]:
            if metric.name in theirs:
                middle, low, high = ratio(metric, theirs[metric.name])
                if not all(map(math.isfinite, (middle, low, high))):
                    continue  # over 0: the divergence of a model from itself
                rows.append({"a": a, "b": b, "metric": metric.name, "median": middle, "low": low, "high": high})
    return rows


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several seeds: means with the spread, ratios with the smallest and largest of the seeds."""
    merged = dict(runs[0])
    merged["seeds"] = [r["seed"] for r in runs]
    merged["interval"] = f"range of {len(runs)} seeds"
    merged["variants"] = []
    for index, row in enumerate(runs[0]["variants"]):
        metrics = {}
        for name, about in row["metrics"].items():
            values = [r["variants"][index]["metrics"][name]["value"] for r in runs if name in r["variants"][index]["metrics"]]
            mean = sum(values) / len(values)
            spread = (sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1)) ** 0.5
            metrics[name] = {**about, "value": mean, "spread": spread, "seeds": values}
        merged["variants"].append({**row, "metrics": metrics})
    merged["ratios"] = []
    for index, row in enumerate(runs[0]["ratios"]):
        values = sorted(r["ratios"][index]["median"] for r in runs if index < len(r["ratios"]))
        merged["ratios"].append({**row, "median": values[len(values) // 2], "low": values[0], "high": values[-1]})
    merged["stages"] = [s for r in runs for s in r["stages"]]
    merged["warnings"] = sorted({w for r in runs for w in r["warnings"]})
    merged["refusals"] = sorted({w for r in runs for w in r["refusals"]})
    return merged


def as_metric(row: dict[str, Any]) -> Metric:
    return Metric(row["name"], row["value"], row["unit"], row["better"], tuple(row["samples"]), tuple(row["weights"]))
