"""Plots as inline SVG: text stays text, colours are CSS variables, the same figures give the same bytes. No pyplot, no state."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from typing import Any, NamedTuple

from smelt._report_words import big

__all__ = ["Point", "Side", "budget", "curves", "front", "losses", "scatter"]

# Drawn in these colours, then replaced: matplotlib knows no var(--ink).
INK, MUTED, LINE, ACCENT, PAPER = "#010203", "#010204", "#010205", "#010206", "#010207"
VARIABLES = {INK: "--ink", MUTED: "--muted", LINE: "--line", ACCENT: "--accent", PAPER: "--paper"}
FONT = 12  # in units of the viewBox; the page shows one as about one pixel
FAR = 1.3  # points this many times worse than the best stand at the edge, else they would press all others together


class Point(NamedTuple):
    name: str
    x: float
    y: float  # lower is better
    low: float | None = None  # interval of x
    high: float | None = None


def front(points: list[Point], higher: bool) -> list[Point]:
    """The points to which no other is at least as good in both and better in one, by x. `higher`: more x is better."""
    sign = 1 if higher else -1

    def beats(a: Point, b: Point) -> bool:
        dx, dy = sign * (a.x - b.x), b.y - a.y
        return dx >= 0 and dy >= 0 and dx + dy > 0

    return sorted((p for p in points if not any(beats(q, p) for q in points)), key=lambda p: p.x)


def scatter(points: list[Point], x_label: str, y_label: str, higher: bool, unit: str = "") -> str:
    """Every variant as a labelled point, those on the Pareto front filled and joined; the good corner is named."""
    figure, axes = _axes(420, 330, unit)
    near = [p.y for p in points if p.y <= FAR * min(q.y for q in points)]
    far = len(near) > 1 and len(near) < len(points)
    edge = max(near) + 0.25 * (max(near) - min(near)) if far else max(p.y for p in points)
    best = [p for p in front(points, higher) if p.y <= edge]
    axes.plot([p.x for p in best], [p.y for p in best], color=ACCENT, lw=1.2, alpha=0.5, drawstyle=f"steps-{'pre' if higher else 'post'}")
    shown = []
    for p in points:
        y = min(p.y, edge)
        if p.low is not None and p.high is not None:
            axes.plot([p.low, p.high], [y, y], color=MUTED, lw=1, zorder=2)  # the interval
        marker, fill = "o" if y == p.y else "^", ACCENT if p in best else PAPER
        axes.plot(p.x, y, marker, ms=7.5, mew=1.4, mec=ACCENT if p in best else MUTED, mfc=fill, zorder=3)
        shown.append(p._replace(name=p.name if y == p.y else f"{p.name}: {p.y:.3g}", y=y))
    axes.margins(0.16, 0.14)
    axes.set_xlabel(x_label, parse_math=False)
    axes.set_ylabel(f"{y_label} (lower is better)", parse_math=False)
    axes.autoscale_view()
    x, side, text = (0.985, "right", "better ↘") if higher else (0.015, "left", "↙ better")
    axes.text(x, 0.03, text, transform=axes.transAxes, ha=side, va="bottom", color=ACCENT, fontsize=FONT)
    joined = [(a, b, b.y if higher else a.y, a.x if higher else b.x) for a, b in itertools.pairwise(best)]
    lines = [((min(a.x, b.x), y), (max(a.x, b.x), y)) for a, b, y, _ in joined] + [
        ((x, min(a.y, b.y)), (x, max(a.y, b.y))) for a, b, _, x in joined
    ]
    _names(axes, figure, shown, lines)
    return _svg(figure, repr((points, x_label)))


class Side(NamedTuple):
    """One axis of a search's plot."""

    label: str
    better: str  # "lower" or "higher"
    limit: float | None = None  # of the budget


def budget(points: list[Point], x: Side, y: Side, best: str) -> str:
    """Candidates of a search by two of their figures. Those on its front have names, the one called `best` is filled.

    Beyond the limits is tinted. The line joins those that no other beats in these two figures; a search with more
    figures has others on its front.
    """
    figure, axes = _axes(420, 330)
    for p in points:
        ink = ACCENT if p.name else MUTED
        if p.name and p.low is not None and p.high is not None:
            axes.plot([p.low, p.high], [p.y, p.y], color=MUTED, lw=1, zorder=2)  # the interval
        axes.plot(p.x, p.y, "o", ms=7.5 if p.name else 4, mew=1.4, mec=ink, mfc=ACCENT if p.name == best else PAPER, zorder=3)
    sign = -1 if y.better == "higher" else 1
    line = [(p.x, sign * p.y) for p in front([p._replace(y=sign * p.y) for p in points], x.better == "higher")]
    axes.plot([px for px, _ in line], [py for _, py in line], color=ACCENT, lw=1.2, alpha=0.5)
    limits = [(x.limit, points[0].y)] * (x.limit is not None) + [(points[0].x, y.limit)] * (y.limit is not None)
    axes.update_datalim(limits or [(points[0].x, points[0].y)])
    axes.margins(0.16, 0.14)
    axes.autoscale_view()
    axes.autoscale(False)
    for side, draw, (low, high) in ((x, axes.axvspan, axes.get_xlim()), (y, axes.axhspan, axes.get_ylim())):
        if side.limit is not None:
            draw(side.limit, high if side.better == "lower" else low, color=LINE, alpha=0.4, lw=0, zorder=0)
    axes.set_xlabel(x.label, parse_math=False)
    axes.set_ylabel(y.label, parse_math=False)
    _names(axes, figure, [p for p in points if p.name], list(itertools.pairwise(line)))
    return _svg(figure, repr((points, x, y)))


def losses(x: list[float], y: list[float]) -> str:
    """Loss against tokens seen: each logged value thin, the mean over a twentieth of the run on top."""
    figure, axes = _axes(340, 200)
    half = max(1, len(y) // 40)
    near = [y[max(0, i - half) : i + half + 1] for i in range(len(y))]
    axes.plot(x, y, color=MUTED, lw=0.8, alpha=0.45)
    axes.plot(x, [sum(part) / len(part) for part in near], color=ACCENT, lw=1.8)
    axes.set_xlim(0, max(*x, 1))
    return _svg(figure, repr((x, y)))


def curves(x: list[float], lines: dict[str, list[float]]) -> str:
    """Several figures of one stage against its steps, told apart by dashes and named at their ends."""
    figure, axes = _axes(340, 200)
    for y, dashes in zip(lines.values(), itertools.cycle(("-", "--", ":", "-.")), strict=False):
        axes.plot(x, y, color=ACCENT if dashes == "-" else INK, ls=dashes, lw=1.6)
    axes.set_xlim(min(x), max(x) + 0.45 * max(max(x) - min(x), 1))  # room for the names
    low, high = axes.get_ylim()
    least, last = 15 / 150 * (high - low), -float("inf")  # names stand at least a line apart
    for name, y in sorted(lines.items(), key=lambda item: item[1][-1]):
        last = max(y[-1], last + least)
        axes.text(max(x) + 0.02 * (max(x) - min(x) or 1), last, name, va="center", color=INK, fontsize=FONT - 1, parse_math=False)
    return _svg(figure, repr((x, lines)))


def _axes(width: int, height: int, unit: str = "") -> tuple[Any, Any]:
    """A figure whose points are the units of the SVG, and its axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    left, bottom = (58, 46) if height > 300 else (44, 26)
    axes: Any = figure.add_axes((left / width, bottom / height, 1 - (left + 12) / width, 1 - (bottom + 10) / height))
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(LINE)
    axes.grid(color=LINE, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, length=0, pad=6, labelsize=FONT)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set(color=MUTED, fontsize=FONT)
        axis.set_major_locator(MaxNLocator(5 if height > 300 else 4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: big(value, unit)))
    return figure, axes


def _names(axes: Any, figure: Any, points: list[Point], lines: list[Any]) -> None:
    """Put each name where it covers least: beside its point, then above, below and further off."""
    at = [(p.name, *axes.transData.transform([(p.low or p.x, p.y), (p.x, p.y), (p.high or p.x, p.y)])) for p in points]
    ends = [axes.transData.transform(line) for line in lines]
    taken = [(a[0] - 2, a[1] - 2, b[0] + 2, b[1] + 2) for a, b in ends]
    taken += [(x - 6, y - 6, x + 6, y + 6) for _, _, (x, y), _ in at] + [(a[0], a[1] - 2, c[0], c[1] + 2) for _, a, _, c in at]
    inside = axes.get_window_extent()
    for name, (low, _), (x, y), (high, _) in sorted(at, key=lambda item: -item[2][1]):
        w, h = (0.56 * FONT * len(name) + 4) / 2, (FONT + 2) / 2
        sides = (max(x + 9, high + 3) + w, min(x - 9, low - 3) - w)
        middle = max(inside.x0 + w, min(x, figure.bbox.x1 - w))
        places = [(cx, y) for cx in sides] + [(middle, y + dy) for dy in (15, -15)] + [(cx, y + dy) for dy in (12, -12) for cx in sides]
        places += [(middle, y + dy) for dy in (29, -29)] + [(cx, y + dy) for dy in (24, -24) for cx in sides]

        def cost(place: tuple[float, float], w: float = w, h: float = h) -> float:
            x0, y0, x1, y1 = place[0] - w, place[1] - h, place[0] + w, place[1] + h
            over = sum(max(0.0, min(x1, t[2]) - max(x0, t[0])) * max(0.0, min(y1, t[3]) - max(y0, t[1])) for t in taken)
            return over + 30 * sum(max(0.0, d) for d in (inside.x0 - x0, x1 - figure.bbox.x1, inside.y0 - y0, y1 - figure.bbox.y1))

        cx, cy = min(places, key=cost)
        taken.append((cx - w, cy - h, cx + w, cy + h))
        cx, cy = axes.transData.inverted().transform((cx, cy))
        axes.text(cx, cy, name, ha="center", va="center_baseline", color=INK, fontsize=FONT, parse_math=False, zorder=4)


def _svg(figure: Any, salt: str) -> str:
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "text.usetex": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks: the browser's has it
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    text = re.sub(
        r"<metadata>.*?</metadata>|<style.*?</style>|<clipPath.*?</clipPath>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.S
    )
    text = re.sub(r'(<g) id="[^"]*"| xmlns(?::\w+)?="[^"]*"| transform="rotate\(-0 [^"]*"| clip-path="[^"]*"', r"\1", text)
    text = re.sub(r' font-family: [^;"]*;', "", text).replace("xlink:href", "href")
    text = re.sub(r'<svg width="[\d.]+pt" height="[\d.]+pt"', '<svg role="img"', text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return re.sub(r"\s*\n\s*", "\n", text).strip()
