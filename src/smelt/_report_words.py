"""Figures as people read them: names, units and roundings, what changed between two variants, and the sentence about it.

Pure functions of the results dict. A ratio is always "this over the other": 0.49x is less, 1.9x is more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any, NamedTuple

__all__ = ["Change", "about", "big", "columns", "compare", "ends", "figures", "finite", "measured", "named", "number", "times"]
__all__ += ["value_of", "verdict", "words"]


class About(NamedTuple):
    """How a metric is shown and spoken of: `6 % worse at <at>`, `1.9x faster to <at>`, `half the <at>`."""

    label: str
    group: str = "Other"
    at: str = ""
    scales: tuple[tuple[float, str], ...] = ()  # (factor, unit), largest first
    digits: int | None = None  # after the point; None: three significant ones for the smallest


BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
RATE, PLAIN = ((1.0, "tokens/s"),), ((1.0, ""),)
KNOWN = {
    "bits_per_byte": About("Bits per byte", "Quality", "predicting unseen text", PLAIN, 3),
    "perplexity": About("Perplexity", "Quality", "predicting unseen text (perplexity)", PLAIN),
    "kl_to_teacher": About("KL to teacher", "Quality", "following the teacher", ((1.0, "nats"),)),
    "top1_agreement": About("Top-1 as teacher", "Quality", "choosing the teacher's token", ((0.01, "%"),), 1),
    "code_search_ndcg10": About("Code search", "Quality", "finding code", ((1.0, "nDCG@10"),), 3),
    "associative_recall": About("Recall", "Quality", "recalling what it read", PLAIN, 3),
    "decode_tokens_per_s": About("Writing", "Speed", "write", RATE),
    "prefill_tokens_per_s": About("Reading", "Speed", "read", RATE),
    "first_token_s": About("First token", "Speed", "start", ((1.0, "s"), (1e-3, "ms"))),
    "tokens_per_call": About("Tokens per call", "Speed", "write in tokens per call", PLAIN),
    "weight_bytes": About("Weights", "Memory", "size", BYTES),
    "disk_bytes": About("On disk", "Memory", "size on disk", BYTES),
    "parameters": About("Parameters", "Memory", "parameters", ((1e9, "billion"), (1e6, "million"), (1.0, ""))),
    "cache_bytes_per_token": About("Cache per token", "Memory", "cache memory", BYTES),
    "cache_held_bytes": About("Cache held", "Memory", "cache memory", BYTES),
    "cache_formula_bytes": About("By its formula", "Memory", "cache memory by its formula", BYTES),
    "cache_share_of_fp16": About("Beside fp16", "Memory", "cache beside fp16", PLAIN, 3),
    "peak_bytes": About("Peak memory", "Memory", "peak memory", BYTES),
}
COUNTED = (
    "weight_bytes",
    "disk_bytes",
    "parameters",
    "cache_bytes_per_token",
    "cache_held_bytes",
    "tokens_per_call",
)  # not sampled: no interval
TWINS = {"perplexity": "bits_per_byte", "kl_to_teacher": "bits_per_byte", "top1_agreement": "bits_per_byte", "parameters": "weight_bytes"}
TWINS |= {"cache_held_bytes": "cache_bytes_per_token", "cache_formula_bytes": "cache_held_bytes", "cache_share_of_fp16": "cache_held_bytes"}
TWINS |= {"tokens_per_call": "decode_tokens_per_s", "first_token_s": "prefill_tokens_per_s"}
SHARES = {1 / 2: "half the", 2 / 3: "two thirds of the", 3 / 4: "three quarters of the", 1 / 3: "a third of the", 1 / 4: "a quarter of the"}
SHARES |= {1 / 5: "a fifth of the", 1 / 8: "an eighth of the", 1 / 10: "a tenth of the"}


def about(metric: str) -> About:
    name = metric.replace("_", " ")
    return KNOWN.get(metric) or About(name[:1].upper() + name[1:], at=name)


class Change(NamedTuple):
    """One metric of two variants. `low` and `high` bound the ratio; both are None where nothing was sampled."""

    metric: str
    better: str
    before: float | None
    after: float | None
    ratio: float
    low: float | None = None
    high: float | None = None

    @property
    def verdict(self) -> str:
        """better, worse, same (no measurable difference) or unclear (too noisy to tell)."""
        if self.low is not None and self.high is not None:
            if self.low <= 1 <= self.high:
                return "unclear" if self.high > 1.5 * self.low else "same"
        elif abs(self.ratio - 1) < (0.0005 if self.metric in COUNTED else 0.005):
            return "same"
        return "better" if (self.ratio > 1) == (self.better == "higher") else "worse"

    @property
    def interval(self) -> str:
        if self.low is None or self.high is None:
            return "" if self.metric in COUNTED else "no interval"
        digits = max(_digits(self.low), _digits(self.high))
        return f"{self.low:.{digits}f} to {self.high:.{digits}f}"


def finite(value: Any) -> float | None:
    good = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def named(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {v["name"]: v for v in results.get("variants") or ()}


def figures(variant: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {metric: figure for metric, figure in (variant.get("metrics") or {}).items() if figure}


def value_of(variant: dict[str, Any], metric: str) -> float | None:
    return finite(figures(variant).get(metric, {}).get("value"))


def ends(results: dict[str, Any]) -> tuple[str, str]:
    """The two variants the headline compares: as the results say, else the first and the last."""
    have, said = list(named(results)), results.get("headline") or {}
    first, last = said.get("from"), said.get("to")
    return (first if first in have else have[0], last if last in have else have[-1]) if have else ("", "")


def compare(results: dict[str, Any], to: str | None = None, origin: str | None = None) -> list[Change]:
    """What changed from `origin` to `to` (default: the headline's). A measured ratio counts before a quotient of values."""
    have = named(results)
    origin, to = origin or ends(results)[0], to or ends(results)[1]
    if origin == to or origin not in have or to not in have:
        return []
    ratios = {(r["a"], r["b"], r["metric"]): [finite(r.get(k)) for k in ("median", "low", "high")] for r in results.get("ratios") or ()}
    changes = []
    for metric in columns({"variants": [have[origin], have[to]]}):
        before, after = value_of(have[origin], metric), value_of(have[to], metric)
        told = figures(have[to]).get(metric) or figures(have[origin])[metric]
        middle, low, high = ratios.get((to, origin, metric)) or [None] * 3
        if middle is None and before and after is not None:
            middle = after / before
        if low is None or high is None or low == high:
            low = high = None
        if middle is not None and middle > 0:
            changes.append(Change(metric, told.get("better", "lower"), before, after, middle, low, high))
    return changes


def words(results: dict[str, Any], to: str | None = None, origin: str | None = None) -> str:
    """The comparison in one sentence: memory, speed, quality; whatever got worse is said."""
    if len(named(results)) < 2:
        return "One variant measured; there is nothing to compare it with." if named(results) else "Nothing was measured."
    changes = {c.metric: c for c in compare(results, to, origin)}
    if not changes:
        return "There is no figure that both variants have."
    said = [c for c in changes.values() if _matters(c, changes)] or list(changes.values())
    memory, speed = ([c for c in said if about(c.metric).group == group] for group in ("Memory", "Speed"))
    quality = [c for c in said if about(c.metric).group in ("Quality", "Other")]
    parts = [_memory(c) for c in memory]
    gained = any(c.verdict == "better" for c in memory)
    if gained and [c.verdict for c in speed] == ["same"]:
        parts[-1] += " but not faster on this machine"
        speed = []
    parts += [_speed(c) for c in speed if c.verdict != "same"]
    if gained and any(c.verdict == "worse" for c in speed):
        parts[-1] += " on this machine"
    last = ""
    for c in (c for c in quality if c.verdict != "same"):
        parts.append(_quality(c, c.verdict != last))
        last = c.verdict
    text = ", ".join(parts)
    if len(parts) > 1:
        text = ", ".join(parts[:-1]) + (", and " if len(parts) > 2 or "but not" in parts[0] else " and ") + parts[-1]
    if same := ["time to " * (c in speed) + about(c.metric).at for c in speed + quality if c.verdict == "same"]:
        text += (", with " if text else "") + "no measurable difference in " + " or ".join(same)
    return text[:1].upper() + text[1:] + "."


def measured(candidate: dict[str, Any], term: str) -> float | None:
    """A figure of a candidate of a search, as a ratio to the base."""
    return finite((candidate["values"].get(term) or [None])[0])


def verdict(results: dict[str, Any]) -> str:
    """What a search found, in two sentences: the best path or the nearest, and what it was chosen from."""
    found = results["search"]
    best = next(c for c in found["candidates"] if c["name"] == found["best"])
    count = f"{len(found['candidates'])} of {found['paths']} paths were measured"
    if found["exact"] and not found["refused"]:
        count = f"All {found['paths']} paths were measured"
    elif found["exact"]:
        count += ", the others cannot be taken"
    told = {t["name"]: f"{t['name'].replace('_', ' ')} {times(value)}" for t in found["terms"] if (value := measured(best, t["name"]))}
    if found["feasible"]:
        return f"The best {found['objective']} within {found['budget']} has {best['name']}: {', '.join(told.values())}. {count}."
    over = []
    for term in found["terms"]:
        value, limit, least = measured(best, term["name"]), term["limit"], term["better"] == "higher"
        if limit is not None and value is not None and (value < limit if least else value > limit):
            over.append(f"{told.get(term['name'], term['name'])} where {'at least' if least else 'at most'} {times(limit)} is asked")
    return f"No path keeps to {found['budget']}. {best['name']} comes nearest: {' and '.join(over)}. {count}."


def _matters(c: Change, changes: dict[str, Change]) -> bool:
    """Prediction and writing speed always, memory when it changed, anything that got worse unless its twin says so already."""
    if TWINS.get(c.metric) in changes:
        return False
    if c.metric == "disk_bytes" and "weight_bytes" in changes and abs(changes["weight_bytes"].ratio / c.ratio - 1) < 0.05:
        return False  # the files follow the weights; said apart only where they are packed
    if c.metric == "weight_bytes" and c.verdict == "same":
        return False
    if c.metric in ("bits_per_byte", "decode_tokens_per_s"):
        return True
    return c.verdict == "worse" or (c.verdict != "same" and c.metric in COUNTED)


def _memory(c: Change) -> str:
    what = about(c.metric).at
    if c.verdict in ("same", "unclear"):
        return f"the same {what}"
    for share, text in SHARES.items():
        if abs(c.ratio / share - 1) <= 0.05:
            return f"{text} {what} ({times(c.ratio)})"
    if c.ratio >= 2 or c.ratio < 0.1:
        return f"{times(c.ratio)} the {what}"
    less, more = ("smaller", "larger") if what == "size" else (f"less {what}", f"more {what}")
    return f"{percent(c.ratio)} {less if c.ratio < 1 else more} ({times(c.ratio)})"


def _speed(c: Change) -> str:
    what = about(c.metric).at
    if c.verdict in ("same", "unclear"):
        return (
            f"no measurable difference in time to {what}" if c.verdict == "same" else f"too noisy a time to {what} to tell ({c.interval})"
        )
    rate = c.ratio if c.better == "higher" else 1 / c.ratio
    factor = max(rate, 1 / rate)
    text = (f"{factor:.1f}x" if factor >= 1.5 else percent(rate)) + (" faster to " if rate > 1 else " slower to ") + what
    return text + (" (measured once)" if c.interval == "no interval" else "")


def _quality(c: Change, full: bool) -> str:
    if c.verdict == "unclear":
        return f"too noisy a figure for {about(c.metric).at} to tell ({c.interval})"
    return f"{percent(c.ratio)} {c.verdict + ' ' if full else ''}{'at' if c.metric in KNOWN else 'in'} {about(c.metric).at}"


def percent(ratio: float) -> str:
    """Distance from 1: 1.061 is `6 %`, 0.985 is `1.5 %`."""
    size = abs(ratio - 1) * 100
    return "less than 0.1 %" if size < 0.1 else f"{size:.0f} %" if size >= 3 else f"{size:.1f}".removesuffix(".0") + " %"


def times(ratio: float) -> str:
    """A ratio with enough digits to tell it from 1: `0.49x`, `1.004x`, `12.3x`."""
    return f"{ratio:.{_digits(ratio)}f}x"


def _digits(ratio: float) -> int:
    return 0 if ratio >= 100 else 1 if ratio >= 10 else 3 if ratio < 0.1 or 0 < abs(ratio - 1) < 0.02 else 2


def big(value: float | None, unit: str = "") -> str:
    """`1.23 M`, `45 kB`: three digits and a prefix."""
    if finite(value) is None or value is None:
        return "–"
    for power, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= power:
            return f"{value / power:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def number(value: Any) -> str:
    got = finite(value)
    return "–" if got is None else f"{got:,.0f}" if abs(got) >= 1000 else f"{got:.4g}"


def columns(results: dict[str, Any]) -> dict[str, tuple[str, Callable[[float | None], str]]]:
    """{metric: (unit to show, how to write a value)} for every metric of any variant: known ones in their order, then others."""
    variants = results.get("variants") or ()
    units = {m: figure.get("unit") or "" for v in variants for m, figure in figures(v).items()}
    order = [m for m in KNOWN if m in units] + sorted(set(units) - set(KNOWN))
    return {m: _column(m, units[m], [value_of(v, m) for v in variants]) for m in order}


def _column(metric: str, unit: str, values: Iterable[float | None]) -> tuple[str, Callable[[float | None], str]]:
    """One scale and one number of digits for all, so that their points stand below each other."""
    sizes = [abs(v) for v in values if v] or [1.0]
    scales = about(metric).scales or (BYTES if unit in ("B", "bytes") else ((1.0, unit),))
    factor, unit = next((scale for scale in scales if max(sizes) >= scale[0]), scales[-1])
    digits = about(metric).digits
    if digits is None:
        digits = 0 if max(sizes) / factor >= 1000 else max(0, min(3, 2 - math.floor(math.log10(min(sizes) / factor))))

    def write(value: float | None) -> str:
        if value is None:
            return "–"
        tiny = value and abs(value / factor) < 0.0005
        return f"{value / factor:.1e}" if tiny else f"{value / factor:,.{digits}f}"

    return unit, write
