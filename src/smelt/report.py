"""Results -> one self-contained page, one table for the terminal, one model card; and the page of all methods.

Pure functions of the results dict (results.json) that return text: writing files is the caller's. Everything is
escaped; the page loads nothing, runs nothing, and forbids itself to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smelt._report_words import (
    Change,
    about,
    big,
    columns,
    compare,
    ends,
    figures,
    finite,
    measured,
    named,
    number,
    times,
    value_of,
    verdict,
    words,
)
from smelt.registry import About
from smelt.spec import Paper

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["compare", "front", "html", "methods_page", "model_card", "table", "words"]

RUNTIME = ("attention", "cache", "decode")  # families bound when a model is loaded; no folder holds them
CONTEXT = 2048  # tokens whose cache counts beside the weights in the plot against memory
TILES = (
    "weight_bytes",
    "decode_tokens_per_s",
    "bits_per_byte",
    "prefill_tokens_per_s",
    "cache_bytes_per_token",
    "cache_held_bytes",
    "code_search_ndcg10",
)
NOTES = {"same": "no measurable difference", "unclear": "too noisy to tell"}
TAGS = {"distill": "distillation", "weights": "compression", "align": "preference-optimization"}
_OUTCOME = {True: '<span class="yes">✓ held</span>', False: '<span class="no">✗ not held</span>'}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


# The page


def html(results: dict[str, Any]) -> str:
    """One page, without a reference to anything outside itself but its links; light and dark, phone and desk."""
    style = Path(__file__).with_name("_report.css").read_text(encoding="utf-8")
    sections = (_top, _notes, _expectations, _search, _variants, _ranking, _plots, _training, _cost, _loading, _recipe, _papers)
    body = "\n".join(text for section in sections if (text := section(results)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{_e(results.get("name") or "run")} · smelt</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _e(value: Any) -> str:
    return escape(str(value), quote=True)


def _whole(text: str) -> str:
    return _e(text).replace(" %", "&nbsp;%")  # no line starts with a percent sign


def _top(results: dict[str, Any]) -> str:
    first, last = ends(results)
    changes = {c.metric: c for c in compare(results)}
    kicker = ["smelt report", results.get("name"), str(results.get("created") or "")[:16].replace("T", " ")]
    text = f'<div class="kicker">{" · ".join(_e(k) for k in kicker if k)}</div>\n<h1>{_whole(words(results))}</h1>\n'
    if results.get("about"):
        text += f'<p class="muted about">{_e(results["about"])}</p>\n'
    if not changes:
        return text
    spent = f"; made in {_time(results['seconds'])}" if finite(results.get("seconds")) is not None else ""
    text += f'<p class="muted about"><b>{_e(last)}</b> beside <b>{_e(first)}</b>{_e(_machine(results))}{spent}</p>\n'
    shown = [m for m in TILES if m in changes] or list(changes)[:6]
    if len(results.get("seeds") or ()) > 1:
        text += f'<p class="muted about">Means over seeds {_e(", ".join(map(str, results["seeds"])))}; intervals are their range.</p>\n'
    return text + f'<div class="tiles">{"".join(_tile(changes[m], *columns(results)[m]) for m in shown)}</div>'


def _tile(c: Change, unit: str, write: Callable[[float | None], str]) -> str:
    name = about(c.metric).label + (f", {unit}" if unit else "")
    spans = [f"{write(c.before)} → {write(c.after)}", NOTES.get(c.verdict, c.verdict) + (f", {c.interval}" if c.interval else "")]
    return (
        f'<div><span class="name">{_e(name)}</span><b class="{c.verdict}">{times(c.ratio)}</b>'
        + "".join(f"<span>{_e(s)}</span>" for s in spans)
        + "</div>"
    )


def _notes(results: dict[str, Any]) -> str:
    told = [str(w) for w in results.get("warnings") or ()]
    told += [f"{s['name']}: {w}" for s in results.get("stages") or () for w in s.get("warnings") or ()]
    text = ""
    for title, items in (("Refused", results.get("refusals") or ()), ("Warnings", dict.fromkeys(told))):
        listed = "".join(f"<li>{_e(item)}</li>" for item in items)
        text += f'<div class="notes"><h3>{title}</h3><ul>{listed}</ul></div>\n' if listed else ""
    return text or '<p class="note quiet">No warnings, nothing refused.</p>'


def _expectations(results: dict[str, Any]) -> str:
    lines = results.get("expect") or ()
    items = "".join(f"<li>{_OUTCOME[bool(x['held'])]} <code>{_e(x['text'])}</code> <small>{_sides(x)}</small></li>" for x in lines)
    title = f"Expectations: {sum(bool(x['held']) for x in lines)} of {len(lines)} held"
    return f'<h2>{title}</h2>\n<ul class="plain">{items}</ul>' if lines else ""


def _sides(x: dict[str, Any]) -> str:
    return f"{number(x.get('left'))} against {number(x.get('right'))}"


def _search(results: dict[str, Any]) -> str:
    """What `smelt search` found: the verdict, quality against every other figure of the search, the front as a table."""
    from smelt._report_plots import Point, Side, budget

    found = results.get("search")
    if not found:
        return ""
    terms, rows = {t["name"]: t for t in found["terms"]}, found["candidates"]
    up, plots = "quality" if "quality" in terms else found["objective"], ""
    sides = {name: Side(_axis(t), t["better"], t["limit"]) for name, t in terms.items()}
    shown = [c for c in rows if c["front"] or c["name"] == found["best"]]
    place = {c["name"]: str(i) for i, c in enumerate(shown, 1)}
    for name in terms:
        points = []
        for c in rows:
            x, low, high = (finite(v) for v in c["values"][name])
            if x is not None and (y := measured(c, up)) is not None:
                points.append(Point(place.get(c["name"], ""), x, y, low, high))
        if name != up and len(points) > 1:
            plot = budget(points, sides[name], sides[up], place[found["best"]])
            plots += f"<figure><h3>{_e(_spoken(up)).capitalize()} against {_e(_spoken(name))}</h3>{plot}</figure>\n"
    heads = ["", *(f"{_e(_spoken(t['name']))}<small>{_e(_limit(t))}</small>" for t in terms.values()), ""]
    body = [[f"{place[c['name']]}&ensp;{_e(c['name'])}", *(_e(_span(c, name)) for name in terms), _within(c, found)] for c in shown]
    note = "Ratios to the base. With a number: no other path is as good in every figure of the search and better in one. "
    note += "Filled: the best, or what came nearest. Tinted: beyond the budget."
    return (
        f'<h2>The search</h2>\n<p>{_whole(verdict(results))}</p>\n<p class="note">{note}</p>\n'
        f'<div class="plots">\n{plots}</div>\n{_rows(heads, body, text=len(terms) + 1)}'
    )


def _axis(term: dict[str, Any]) -> str:
    return f"{_spoken(term['name'])} beside the base ({term['better']} is better)"


def _spoken(name: str) -> str:
    return name.replace("_", " ")


def _limit(term: dict[str, Any]) -> str:
    return "" if term["limit"] is None else f"{'at most' if term['better'] == 'lower' else 'at least'} {times(term['limit'])}"


def _span(candidate: dict[str, Any], name: str) -> str:
    middle, low, high = (finite(v) for v in candidate["values"].get(name) or (None, None, None))
    text = "–" if middle is None else times(middle)
    return text if low is None or high is None or low == high else f"{text} [{low:.3g}, {high:.3g}]"


def _within(candidate: dict[str, Any], found: dict[str, Any]) -> str:
    if candidate["name"] == found["best"]:
        return "the best" if found["feasible"] else "the nearest"
    return "within" if candidate["violation"] == 0 else "beyond the budget"


def _variants(results: dict[str, Any]) -> str:
    shown, have, (base, last) = columns(results), named(results), ends(results)
    grouped: dict[str, list[str]] = {}
    for m in shown:
        grouped.setdefault(about(m).group, []).append(m)
    order = [m for members in grouped.values() for m in members]
    edges = {members[0]: ' class="first"' for members in grouped.values()}
    best = {m: _best(results, m) for m in order}
    said = rows = ""
    for name, v in have.items():
        parent = v.get("parent") if v.get("parent") in have else base
        after = f", after {_e(v['parent'])}" if v.get("parent") else ""
        row = {c.metric: c for c in compare(results, name, base)}
        cells = "".join(_cell(v, m, shown[m][1], row.get(m), name in best[m], m in edges) for m in order)
        mark = ' class="to"' if name == last != base else ""
        rows += f"<tr{mark}><th>{_e(name)}<small>{_e(v.get('kind') or '')}{after}</small></th>{cells}</tr>\n"
        if name not in (base, parent):
            said += f"<dt>{_e(name)}<small>beside {_e(parent)}</small></dt><dd>{_whole(words(results, name, parent))}</dd>\n"
    groups = "".join(f'<th class="first" colspan="{len(members)}">{g}</th>' for g, members in grouped.items())
    heads = "".join(f"<th{edges.get(m, '')}>{_e(about(m).label)}<small>{_e(shown[m][0])}</small></th>" for m in order)
    steps = f'<h2>Step by step</h2>\n<dl class="words">\n{said}</dl>\n' if said else ""
    note = f"Small: ratio to {_e(base)}, coloured where it is more than noise. Underlined: best of its column, or not measurably behind."
    return (
        f'{steps}<h2>All variants</h2>\n<p class="note">{note}</p>\n<div class="wide"><table class="variants">\n'
        f'<thead><tr class="groups"><th></th>{groups}</tr><tr><th></th>{heads}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>\n'
        + _ratios(results)
        if have
        else ""
    )


def _best(results: dict[str, Any], metric: str) -> set[str]:
    """The variant with the best value and all that are not measurably behind it; nobody where that is everybody."""
    values = {name: value for name, v in named(results).items() if (value := value_of(v, metric)) is not None}
    better = {figures(v).get(metric, {}).get("better") for v in named(results).values()}
    if not values:
        return set()
    spans, base = {name: (value, value) for name, value in values.items()}, ends(results)[0]
    for name in values:
        c = next((c for c in compare(results, name, base) if c.metric == metric), None)
        if c and c.before and c.low and c.high:
            spans[name] = (c.before * c.low, c.before * c.high)
    low, high = spans[(max if "higher" in better else min)(values, key=lambda name: values[name])]
    level = {name for name, span in spans.items() if span[0] <= high and span[1] >= low}
    return level if len(level) < len(values) else set()


def _cell(v: dict[str, Any], metric: str, write: Callable[[float | None], str], c: Change | None, best: bool, first: bool) -> str:
    classes = " ".join(["best"] * best + ["first"] * first)
    tip = f"{times(c.ratio)}, {c.interval + ': ' if c.interval else ''}{NOTES.get(c.verdict, c.verdict)}" if c else ""
    small = f'<small class="{c.verdict}">{times(c.ratio)}</small>' if c else ""
    return f'<td class="{classes}" title="{_e(tip)}"><span>{write(value_of(v, metric))}</span>{small}</td>'


def _ratios(results: dict[str, Any]) -> str:
    rows = [
        [_e(f"{r['a']} / {r['b']}"), _e(about(r["metric"]).label), *(number(r.get(k)) for k in ("median", "low", "high"))]
        for r in results.get("ratios") or ()
    ]
    page = _rows(["", "Metric", "Ratio", "Low", "High"], rows, text=1)
    return (
        f"<details><summary>All measured ratios, each with its {_e(results.get('interval', '95 % interval'))}</summary>{page}</details>"
        if rows
        else ""
    )


def _rows(heads: list[str], rows: list[list[str]], text: int) -> str:
    """A plain table of cells that are HTML already; figures stand on the right, column `text` on the left."""

    def line(row: list[str], tag: str) -> str:
        return "".join(f"<{tag}{' class=text' if i == text else ''}>{cell}</{tag}>" for i, cell in enumerate(row))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{line(heads, "th")}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _ranking(results: dict[str, Any]) -> str:
    """The branches of every fork of three or more, best first: by the first quality figure they all have, paired by seed."""
    shown, text = columns(results), ""
    if results.get("search"):
        return ""  # its variants are no branches of one fork, and it has a table of its own
    forks: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
    for v in named(results).values():
        if v.get("parent"):
            forks.setdefault((v["parent"], v.get("kind")), []).append(v)
    for (parent, _), members in forks.items():
        metric = next((m for m in shown if about(m).group == "Quality" and all(value_of(v, m) is not None for v in members)), None)
        if len(members) < 3 or metric is None:
            continue
        sign = -1 if figures(members[0])[metric].get("better") == "higher" else 1
        ranked = [v for _, _, v in sorted((sign * figures(v)[metric]["value"], at, v) for at, v in enumerate(members))]
        unit, write = shown[metric]
        rows, best = [], figures(ranked[0])[metric]
        for place, v in enumerate(ranked, 1):
            own = figures(v)[metric]
            pairs = [a / b for a, b in zip(own.get("seeds") or (), best.get("seeds") or (), strict=False) if b]
            apart = f"{times(min(pairs))} to {times(max(pairs))}" if len(pairs) > 1 and place > 1 else ""
            tie = " <small>a tie in some seed</small>" if apart and sign * (min(pairs) if sign > 0 else max(pairs)) <= sign else ""
            ratio = times(value_of(v, metric) / best["value"]) if best["value"] else ""
            rows.append([str(place), _e(v["name"]) + tie, write(own["value"]), ratio, apart])
        heads = ["", f"after {_e(parent)}", _e(about(metric).label + (f", {unit}" if unit else "")), "to the best", "over seeds"]
        text += _rows(heads, rows, text=1) + "\n"
    return f"<h2>Ranking</h2>\n{text}" if text else ""


def _plots(results: dict[str, Any]) -> str:
    from smelt._report_plots import Point, scatter

    have, (base, _) = named(results), ends(results)
    quality = next((m for m in ("bits_per_byte", "perplexity") if sum(value_of(v, m) is not None for v in have.values()) > 1), None)
    if quality is None:
        return ""
    bare = [name.split("(")[0] for name in have]
    short = {n: b if bare.count(b) == 1 else n if len(n) <= 30 else n[:29] + "…" for n, b in zip(have, bare, strict=True)}
    speed, memory = [], []
    label, size = _memory(results)
    for name, v in have.items():
        y, x = value_of(v, quality), value_of(v, "decode_tokens_per_s")
        if y is None:
            continue
        if x is not None:
            c = next((c for c in compare(results, name, base) if c.metric == "decode_tokens_per_s"), None)
            bounds = (c.before * c.low, c.before * c.high) if c and c.before and c.low and c.high else (None, None)
            speed.append(Point(short[name], x, y, *bounds))
        if (held := size(v)) is not None:
            memory.append(Point(short[name], held, y))
    axis = about(quality).label.lower()
    plots = ""
    if len(speed) > 1:
        plots += f"<figure><h3>Quality against writing speed</h3>{scatter(speed, 'tokens written per second', axis, True)}</figure>\n"
    if len(memory) > 1:
        plots += f"<figure><h3>Quality against memory</h3>{scatter(memory, label, axis, False, 'B')}</figure>\n"
    note = "Filled: no other variant is at least as good in both. A triangle stands at the edge: its value is further off."
    return f'<h2>What is traded for what</h2>\n<p class="note">{note}</p>\n<div class="plots">\n{plots}</div>' if plots else ""


def _memory(results: dict[str, Any]) -> tuple[str, Callable[[dict[str, Any]], float | None]]:
    """What it takes to run: weights and the cache of CONTEXT tokens where every variant has both, else weights, else the peak."""
    every = {m for m in columns(results) if all(value_of(v, m) is not None for v in named(results).values())}
    if {"weight_bytes", "cache_bytes_per_token"} <= every:
        both = f"weights and the cache of {CONTEXT:,} tokens"
        return both, lambda v: v["metrics"]["weight_bytes"]["value"] + CONTEXT * v["metrics"]["cache_bytes_per_token"]["value"]
    name = "weight_bytes" if "weight_bytes" in every else "peak_bytes"
    return about(name).label.lower(), lambda v: value_of(v, name)


def _training(results: dict[str, Any]) -> str:
    from smelt._report_plots import curves, losses

    plots = ""
    for s in results.get("stages") or ():
        log = [e for e in s.get("log") or () if finite(e.get("loss")) is not None]
        if len(log) > 1:
            x, y = [float(e.get("tokens") or e.get("step") or 0) for e in log], [float(e["loss"]) for e in log]
            caption = f"{y[0]:.3g} → {y[-1]:.3g} after {big(x[-1])} tokens"
            plots += f"<figure><h3>{_e(s['name'])}</h3><figcaption>{caption}</figcaption>{losses(x, y)}</figure>\n"
        told = dict((s.get("report") or {}).get("curves") or {})  # {"step": [...], name: [...]}, as teacher_hacking leaves them
        steps, lines = told.pop("step", []), {str(k).replace("_", " "): v for k, v in told.items()}
        if len(steps) > 1 and lines and all(len(v) == len(steps) for v in lines.values()):
            plots += f"<figure><h3>{_e(s['name'])}</h3><figcaption>along its steps, nats</figcaption>{curves(steps, lines)}</figure>\n"
    note = "Loss in nats against tokens seen. Objectives measure different things: compare shapes, not heights."
    return f'<h2>Training</h2>\n<p class="note">{note}</p>\n<div class="plots curves">\n{plots}</div>' if plots else ""


def _cost(results: dict[str, Any]) -> str:
    stages = [s for s in results.get("stages") or () if s.get("kind") not in RUNTIME]
    rows = [
        [
            f"{_e(s['name'])}<small>{_e(s.get('kind') or '')}</small>",
            f"{_time(s.get('seconds'))}<small>{'reused' if s.get('reused') else 'made now'}</small>",
            big(s.get("tokens")),
            big(s.get("flops")),
            f"<code>{_e(s.get('folder') or '–')}</code>",
        ]
        for s in stages
    ]
    told = "".join(f"<h3>{_e(s['name'])}</h3><pre>{_e(_json(s['report']))}</pre>" for s in stages if s.get("report"))
    told = f"<details><summary>What each stage reported</summary>{told}</details>" if told else ""
    return f"<h2>What it cost</h2>\n{_rows(['', 'Time', 'Tokens', 'FLOPs', 'Folder'], rows, text=4)}{told}" if rows else ""


def _loading(results: dict[str, Any]) -> str:
    code = _load(results, ends(results)[1])
    return f'<h2>Load the result</h2>\n<p class="note">From the folder of this page.</p>\n<pre>{_e(code)}</pre>' if code else ""


def _recipe(results: dict[str, Any]) -> str:
    machine, versions = results.get("machine") or {}, results.get("versions") or {}
    facts = {"smelt": results.get("smelt"), **versions, "seed": results.get("seed"), "git": results.get("git")}
    facts |= {k: v for k, v in machine.items() if k != "memory_gb"} | ({"gpu": machine.get("gpu") or "none"} if machine else {})
    facts["memory"] = f"{number(machine['memory_gb'])} GB" if machine.get("memory_gb") else None
    listed = "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in facts.items() if v is not None)
    recipe = _e(str(results.get("recipe") or "").rstrip())
    left = f"<section><h2>Recipe</h2>\n<pre>{recipe}</pre></section>\n" if recipe else ""
    right = f'<section><h2>Versions and machine</h2>\n<dl class="facts">{listed}</dl></section>' if listed else ""
    return f'<div class="pair">{left}{right}</div>' if left or right else ""


def _papers(results: dict[str, Any]) -> str:
    items = ""
    for p in _cited(results.get("stages") or ()):
        title = f'<a href="{_e(p.url)}" rel="noreferrer">{_e(p.title)}</a>' if _safe(p.url) else _e(p.title)
        items += f"<li>{title}{', ' + _e(p.where) if p.where else ''}</li>\n"
    return f'<h2>Papers</h2>\n<ul class="plain">\n{items}</ul>' if items else ""


def _cited(stages: Iterable[dict[str, Any]]) -> list[Paper]:
    """Every paper once, in the order of the stages."""
    papers = [
        Paper(p.get("title") or p.get("link") or "", p.get("link") or "", p.get("where") or "")
        for s in stages
        for p in s.get("papers") or ()
    ]
    return list({(p.title, p.link): p for p in papers}.values())


def _safe(url: str) -> bool:
    return url.startswith(("https://", "http://")) and not set(url) & set(' "<>\\|\n')


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, default=str, ensure_ascii=False)


def _time(seconds: Any) -> str:
    if (s := finite(seconds)) is None:
        return "–"
    if s < 100:
        return f"{s:.1f} s" if s < 10 else f"{s:.0f} s"
    minutes, rest = divmod(round(s), 60)
    return f"{minutes} min {rest} s" if s < 3600 else f"{minutes // 60} h {minutes % 60} min"


def _machine(results: dict[str, Any]) -> str:
    machine = results.get("machine") or {}
    parts = [machine.get("gpu") or machine.get("cpu"), f"{machine['cores']} cores" if machine.get("cores") else ""]
    return ", on " + ", ".join(p for p in parts if p) if any(parts) else ""


# How a variant came about and how it is loaded


def _line(results: dict[str, Any], variant: str | None) -> list[dict[str, Any]]:
    """The variant and all it was made from, first ancestor first."""
    have, line = named(results), []
    while variant in have and have[variant] not in line:
        line += [have[variant], *reversed(have[variant].get("through") or ())]  # the stages between it and its parent
        variant = have[variant].get("parent")
    return line[::-1]


def _load(results: dict[str, Any], variant: str, folder: str | None = None) -> str:
    """Python that loads it: plain transformers for a folder, smelt where runtime methods are bound to one."""
    line = _line(results, variant)
    held = [v["folder"] for v in line if v.get("folder")]
    source = folder or (held[-1] if held else line[0].get("text") if line else None)
    if not source:
        return ""
    bound = "".join(
        f", {kind}={json.dumps(text)}" for kind, text in {v["kind"]: v["text"] for v in line if v.get("kind") in RUNTIME}.items()
    )
    if bound or source == "embedded":
        return f"import smelt\n\nmodel, tokenizer, _ = smelt.load({json.dumps(source)}{bound})"
    return (
        f"from transformers import AutoModelForCausalLM, AutoTokenizer\n\nfolder = {json.dumps(source)}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)"
    )


# The terminal


class _Table:
    """Variants by as many metrics as the terminal is wide; a cell holds the value and its ratio to the first, with its interval."""

    def __init__(self, results: dict[str, Any], path: str):
        self.results, self.path = results, path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        shown, have, (base, last) = columns(self.results), named(self.results), ends(self.results)
        order = sorted(shown, key=lambda m: TILES.index(m) if m in TILES else len(TILES))
        wide = min(max([len(name) for name in have] + [8]), 24)
        left, out, skipped = options.max_width - wide - 2, Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim"), 0
        out.add_column("", width=wide, overflow="ellipsis")
        picked: list[list[Text]] = []
        for metric in order:
            head = f"{about(metric).label}\n{shown[metric][0]}"
            cells = [self._cell(v, metric, shown[metric][1], base) for v in have.values()]
            size = max(len(part) for text in [head, *(cell.plain for cell in cells)] for part in text.split("\n"))
            if left < size:
                skipped += 1
                continue
            left -= size + 2
            out.add_column(head, justify="right", no_wrap=True)
            picked.append(cells)
        for i, name in enumerate(have):
            out.add_row(Text(name, style="bold" if name == last else ""), *(cells[i] for cells in picked))
        if have:
            yield out
        yield Text(f"and {skipped} more figures in the report\n" if skipped else "", style="dim")
        for refusal in self.results.get("refusals") or ():
            yield Text(f"not measured: {refusal}", style="yellow")
        yield Text(words(self.results), style="bold")
        if self.path:
            yield Text(f"Report: {self.path}", overflow="fold")

    def _cell(self, v: dict[str, Any], metric: str, write: Callable[[float | None], str], base: str) -> Any:
        from rich.text import Text

        cell = Text(write(value_of(v, metric)))
        for c in compare(self.results, v["name"], base):
            if c.metric == metric:
                cell.append("\n").append(times(c.ratio), style={"better": "green", "worse": "red"}.get(c.verdict, "dim"))
                cell.append(f" [{c.interval.replace(' to ', ', ')}]" if c.low else "", style="dim")
        return cell


def table(results: dict[str, Any], path: str | Path = "") -> Any:
    """A rich renderable: the variants, then the headline in words and, where given, the path of the report."""
    return _Table(results, str(path))


class _Front:
    """The front of a search with the figures it went by, the verdict, the headline."""

    def __init__(self, results: dict[str, Any], path: str):
        self.results, self.path = results, path

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.table import Table
        from rich.text import Text

        found, out = self.results["search"], Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
        out.add_column("", overflow="fold")
        for term in found["terms"]:
            out.add_column(Text(f"{_spoken(term['name'])}\n{_limit(term)}"), justify="right", no_wrap=True)
        out.add_column("", no_wrap=True)
        for c in found["candidates"]:
            best = c["name"] == found["best"]
            if c["front"] or best:
                cells = [Text(_span(c, term["name"])) for term in found["terms"]]
                out.add_row(Text(c["name"], style="bold" if best else ""), *cells, Text(_within(c, found), style="dim"))
        yield out
        yield Text(verdict(self.results), style="bold" if found["feasible"] else "bold red")
        if len(named(self.results)) > 1 and found["best"] != "base":
            yield Text(words(self.results))
        if self.path:
            yield Text(f"Report: {self.path}", overflow="fold")


def front(results: dict[str, Any], path: str | Path = "") -> Any:
    """A rich renderable of a search: its front, what is best, how that compares with the base, the path of the report."""
    return _Front(results, str(path))


# The model card


def model_card(results: dict[str, Any], variant: str) -> str:
    """README.md of a variant's folder, with the front matter the hub reads."""
    import yaml

    line, stages = _line(results, variant), {s["name"]: s for s in results.get("stages") or ()}
    base = line[0] if line else {"name": variant}
    source = str(base.get("text") or "")
    on_hub = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    front: dict[str, Any] = {"base_model": source} if on_hub else {}
    front |= {"license": results["license"]} if results.get("license") else {}
    tags = ["smelt", *(TAGS[v["kind"]] for v in line if v.get("kind") in TAGS)]
    front |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": list(dict.fromkeys(tags))}
    made = [stages[v["name"]] for v in line[1:] if v["name"] in stages]
    done = ""
    for i, s in enumerate(made, 1):
        spent = [f"{big(s['tokens'])} tokens" if s.get("tokens") else "", _time(s["seconds"]) if s.get("seconds") else ""]
        done += ", ".join([f"{i}. {_md(s.get('kind') or '')}: {_code(s.get('text') or s['name'])}", *filter(None, spent)]) + "\n"
        done += "".join(f"   - warning: {_md(w)}\n" for w in s.get("warnings") or ())
    told = _md(words(results, variant, base["name"])) + "\n\n" if variant != base["name"] else ""
    parts = {
        "What was done": done,
        f"Measured{_md(_machine(results))}": _beside(results, base["name"], variant),
        "Load": _fence(_load(results, variant, "path/to/this/folder"), "python"),
        "Recipe": _fence(str(results.get("recipe") or "").rstrip(), "yaml"),
        "Papers": "".join(f"- {_link(p)}{', ' + _md(p.where) if p.where else ''}\n" for p in _cited(made)),
    }
    title = f"{_md(results.get('name') or 'smelt')}: {_md(variant)}"
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n# {title}\n\n"
        f"{told}Made from {_code(source or base['name'])} with smelt {_md(results.get('smelt') or '')}.\n"
        + "".join(f"\n## {title}\n\n{text}" for title, text in parts.items() if text)
    )


def _beside(results: dict[str, Any], base: str, variant: str) -> str:
    """The Markdown table of all metrics of two variants."""
    have, changes = named(results), {c.metric: c for c in compare(results, variant, base)}
    text = f"| | {_md(base)} | {_md(variant)} | ratio | {_md(results.get('interval', '95 % interval'))} |\n|---|---:|---:|---:|---:|\n"
    for m, (unit, write) in columns(results).items():
        before, after = (value_of(have.get(name, {}), m) for name in (base, variant))
        if before is not None or after is not None:
            tail = f"{times(changes[m].ratio)} | {changes[m].interval}" if m in changes else " | "
            text += f"| {_md(about(m).label)}{', ' + _md(unit) if unit else ''} | {write(before)} | {write(after)} | {tail} |\n"
    return text


def _md(text: Any) -> str:
    """One line of Markdown that says just this: no markup, no new column, no HTML."""
    flat = escape(" ".join(str(text).split()).replace("\\", "\\\\"), quote=False)
    return "".join("\\" + sign if sign in "|`*[]#" else sign for sign in flat)


def _code(text: Any) -> str:
    flat = " ".join(str(text).split()).replace("|", "\\|")
    return f"`{flat}`" if "`" not in flat else f"<code>{escape(flat).replace('`', '&#96;')}</code>"


def _fence(text: str, language: str) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}\n" if text else ""


def _link(paper: Paper) -> str:
    return f"[{_md(paper.title)}](<{paper.url}>)" if _safe(paper.url) else _md(paper.title)


# The page of all methods


def methods_page(abouts: Iterable[About], entries: Iterable[dict[str, Any]]) -> str:
    """docs/methods.md: one table per family from the methods' own files, and how each claim fared when last measured."""
    latest = {(e.get("family"), e.get("name")): e for e in sorted(entries, key=lambda e: str(e.get("when") or ""))}
    text = "# Methods\n\nWritten from the methods' own files and claims/ledger.jsonl by `smelt methods --write`: do not edit.\n"
    family = ""
    for a in sorted(abouts, key=lambda a: (a.family, a.name)):
        if a.family != family:
            family = a.family
            text += f"\n## {family}\n\n| method | rule | paper | parameters | claim |\n|---|---|---|---|---|\n"
        rule = _md(a.summary).replace("\\`", "`")
        paper = _link(Paper(a.title, a.link, a.where)) + (f", {_md(a.where)}" if a.where else "")
        fields = "<br>".join(_code(f"{name}={default}" if default else name) for name, default in a.fields)
        text += f"| {_code(a.name)} | {rule} | {paper} | {fields} | {_claim(latest.get((a.family, a.name)))} |\n"
    return text


def _claim(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "not measured yet"
    changed = "".join(f", with {_code(f'{k}={v}')}" for k, v in (entry.get("changed") or {}).items())
    text = f"{'held' if entry.get('held') else '**not held**'}, {_md(str(entry.get('when') or '')[:10])}{changed}"
    for x in entry.get("figures") or ():
        text += f"<br>{_code(x['text'])}: {_sides(x)}"
    return text
