from __future__ import annotations

import copy
import io
import json
import math
import re
import subprocess
import sys
from html import escape
from html.parser import HTMLParser

import pytest
import yaml
from rich.console import Console

from smelt import registry
from smelt._report_plots import Point, front, scatter
from smelt._report_words import big, columns, number, percent, times
from smelt.registry import About
from smelt.report import compare, html, methods_page, model_card, table, words

UNITS = {"bits_per_byte": ("bits per byte", "lower"), "decode_tokens_per_s": ("tokens/s", "higher"), "weight_bytes": ("bytes", "lower")}
UNITS |= {"cache_bytes_per_token": ("bytes", "lower"), "code_search_ndcg10": ("", "higher"), "kl_to_teacher": ("nats per token", "lower")}
UNITS |= {"prefill_tokens_per_s": ("tokens/s", "higher"), "perplexity": ("", "lower"), "peak_bytes": ("bytes", "lower")}


def variant(name, kind="model", parent=None, folder=None, text=None, **figures):
    metrics = {
        m: {"value": x, "unit": UNITS.get(m, ("", "lower"))[0], "better": UNITS.get(m, ("", "lower"))[1]} for m, x in figures.items()
    }
    return {"name": name, "text": text or f"{name}()", "parent": parent, "kind": kind, "folder": folder, "metrics": metrics}


def pair(intervals=None, **ratios):
    """Two variants, `a` with every metric 1000 and `b` with the given multiples; intervals by metric."""
    results = {
        "variants": [variant("a", **dict.fromkeys(ratios, 1000.0)), variant("b", parent="a", **{m: 1000 * r for m, r in ratios.items()})]
    }
    bounds = (intervals or {}).items()
    results["ratios"] = [{"a": "b", "b": "a", "metric": m, "median": ratios[m], "low": low, "high": high} for m, (low, high) in bounds]
    return results


@pytest.fixture
def full():
    """A run with a fork, a quantized cache and every part of results.json."""
    metrics = ("bits_per_byte", "decode_tokens_per_s", "weight_bytes", "cache_bytes_per_token", "kl_to_teacher")
    made = [
        variant(name, kind, parent, folder, text, **dict(zip(metrics, figures, strict=True)))
        for name, kind, parent, folder, text, *figures in (
            ("base", "model", None, None, "embedded", 1.2, 200, 14e6, 6144, 0.0),
            ("minitron", "weights", "base", "stages/minitron-1", "minitron(layers=4)", 2.4, 400, 7e6, 4096, 1.0),
            ("forward_kl", "distill", "minitron", "stages/forward_kl-2", "forward_kl()", 1.26, 400, 7e6, 4096, 0.1),
            ("kivi(bits=2)", "cache", "forward_kl", "stages/forward_kl-2", "kivi(bits=2)", 1.28, 300, 7e6, 768, 0.2),
        )
    ]
    ratios = []
    for v, other in ((v, o) for v in made[1:] for o in made if o["name"] in ("base", v["parent"])):
        for m, width in (("bits_per_byte", 0.01), ("decode_tokens_per_s", 0.05)):
            r = v["metrics"][m]["value"] / other["metrics"][m]["value"]
            ratios.append({"a": v["name"], "b": other["name"], "metric": m, "median": r, "low": r * (1 - width), "high": r * (1 + width)})
    log = [{"step": i, "tokens": 1000 * i, "loss": 3 / i, "lr": 1e-3} for i in range(1, 40)]
    paper = {"title": "Knowledge Distillation", "link": "arXiv:1503.02531", "where": "section 2"}
    kivi = {"title": "KIVI", "link": "arXiv:2402.02750", "where": ""}
    empty = {"tokens": None, "flops": None, "log": [], "report": {}, "warnings": [], "papers": [], "reused": False}
    stages = [{**empty, "name": v["name"], "kind": v["kind"], "text": v["text"], "digest": "1", "folder": v["folder"]} for v in made[1:]]
    stages[0] |= {"seconds": 14.0, "reused": True, "report": {"matched": "49 of 49"}, "warnings": ["heads were kept"]}
    stages[1] |= {"seconds": 150.0, "tokens": 1_500_000, "flops": 9.1e13, "log": log, "papers": [paper]}
    stages[2] |= {"seconds": 0.0, "folder": None, "papers": [paper, kivi]}
    return {
        "smelt": "0.1.0", "name": "quick", "recipe": "name: quick\nstages:\n  - distill: forward_kl()\n", "seed": 3, "git": "abc123",
        "versions": {"python": "3.11.9", "torch": "2.13.0"}, "created": "2025-11-21T10:44:03+00:00", "seconds": 412.7,
        "machine": {"cpu": "a CPU", "cores": 2, "memory_gb": 7.8, "gpu": None, "os": "Linux"},
        "headline": {"from": "base", "to": "forward_kl"}, "variants": made, "ratios": ratios, "stages": stages,
        "warnings": ["minitron: heads were kept"], "refusals": ["sink_window with speculative: no crop"],
        "expect": [{"text": "forward_kl.bits_per_byte <= 1.08 * base.bits_per_byte", "held": True, "left": 1.26, "right": 1.296}],
    }  # fmt: skip


# Words

SAMPLED = {"bits_per_byte": (1.05, 1.07), "decode_tokens_per_s": (1.8, 2.0)}
SITUATIONS = {
    "the common case": (
        pair(SAMPLED, weight_bytes=0.49, decode_tokens_per_s=1.9, bits_per_byte=1.06),
        "Half the size (0.49x), 1.9x faster to write, and 6 % worse at predicting unseen text.",
    ),
    "perplexity and parameters say the same again": (
        pair(SAMPLED, weight_bytes=0.49, parameters=0.5, decode_tokens_per_s=1.9, bits_per_byte=1.06, perplexity=1.2, kl_to_teacher=3.0),
        "Half the size (0.49x), 1.9x faster to write, and 6 % worse at predicting unseen text.",
    ),
    "several losses": (
        pair({"code_search_ndcg10": (0.9, 0.94)} | SAMPLED, decode_tokens_per_s=1.9, bits_per_byte=1.06, code_search_ndcg10=0.92),
        "1.9x faster to write, 6 % worse at predicting unseen text, and 8 % at finding code.",
    ),
    "a loss and a gain": (
        pair({"code_search_ndcg10": (0.9, 0.94), "bits_per_byte": (0.96, 0.98)}, bits_per_byte=0.97, code_search_ndcg10=0.92),
        "3 % better at predicting unseen text and 8 % worse at finding code.",
    ),
    "smaller, not faster": (
        pair(
            {"bits_per_byte": (1.002, 1.006), "decode_tokens_per_s": (0.97, 1.04)},
            weight_bytes=0.25,
            decode_tokens_per_s=1.01,
            bits_per_byte=1.004,
        ),
        "A quarter of the size (0.25x) but not faster on this machine, and 0.4 % worse at predicting unseen text.",
    ),
    "packed on disk, dense once loaded": (
        pair(
            {"bits_per_byte": (1.002, 1.006), "decode_tokens_per_s": (0.97, 1.04)},
            weight_bytes=1,
            disk_bytes=0.3,
            decode_tokens_per_s=1.01,
            bits_per_byte=1.004,
        ),
        "70 % less size on disk (0.30x) but not faster on this machine, and 0.4 % worse at predicting unseen text.",
    ),
    "files that follow the weights are said once": (
        pair(SAMPLED, weight_bytes=0.49, disk_bytes=0.5, decode_tokens_per_s=1.9, bits_per_byte=1.06),
        "Half the size (0.49x), 1.9x faster to write, and 6 % worse at predicting unseen text.",
    ),
    "less cache, slower": (
        pair(
            {"decode_tokens_per_s": (0.7, 0.8), "bits_per_byte": (0.999, 1.001)},
            cache_bytes_per_token=0.12,
            decode_tokens_per_s=0.75,
            bits_per_byte=1,
        ),
        "An eighth of the cache memory (0.12x) and 25 % slower to write on this machine, "
        "with no measurable difference in predicting unseen text.",
    ),
    "a cache counted three ways is said once": (
        pair(
            {"bits_per_byte": (1.005, 1.009)}, cache_held_bytes=0.1, cache_formula_bytes=0.1, cache_share_of_fp16=0.1, bits_per_byte=1.007
        ),
        "A tenth of the cache memory (0.10x) and 0.7 % worse at predicting unseen text.",
    ),
    "everything level": (
        pair(
            {"decode_tokens_per_s": (0.97, 1.02), "bits_per_byte": (0.99, 1.01)},
            weight_bytes=1.0,
            decode_tokens_per_s=1.0,
            bits_per_byte=1.0,
        ),
        "No measurable difference in time to write or predicting unseen text.",
    ),
    "too noisy": (
        pair({"decode_tokens_per_s": (0.6, 1.9)}, decode_tokens_per_s=1.4, bits_per_byte=1.5),
        "Too noisy a time to write to tell (0.60 to 1.90) and 50 % worse at predicting unseen text.",
    ),
    "no interval": (pair(decode_tokens_per_s=0.4), "2.5x slower to write (measured once)."),
    "larger": (pair(weight_bytes=1.12, parameters=1.0), "12 % larger (1.12x)."),
    "much larger": (pair(weight_bytes=3.0), "3.00x the size."),
    "an odd share": (pair(weight_bytes=0.57, cache_bytes_per_token=0.85), "43 % smaller (0.57x) and 15 % less cache memory (0.85x)."),
    "bad news is never left out": (
        pair({"peak_bytes": (1.1, 1.3), "prefill_tokens_per_s": (0.5, 0.6)}, weight_bytes=0.5, peak_bytes=1.2, prefill_tokens_per_s=0.55),
        "Half the size (0.50x), 20 % more peak memory (1.20x), and 1.8x slower to read on this machine.",
    ),
    "a metric of somebody else": (pair({"my_error": (1.2, 1.4)}, my_error=1.3), "30 % worse in my error."),
    "barely": (pair({"bits_per_byte": (1.0001, 1.0009)}, bits_per_byte=1.0005), "Less than 0.1 % worse at predicting unseen text."),
    "nothing in common": ({"variants": [variant("a", perplexity=1.0), variant("b")]}, "There is no figure that both variants have."),
    "one": ({"variants": [variant("a", perplexity=1.0)]}, "One variant measured; there is nothing to compare it with."),
    "none": ({}, "Nothing was measured."),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_words(situation):
    results, expected = SITUATIONS[situation]
    assert words(results) == expected


def test_headline_names_the_two_variants(full):
    assert words(full) == words(full, to="forward_kl", origin="base")
    assert words(full, to="kivi(bits=2)", origin="forward_kl") == (
        "81 % less cache memory (0.19x), 25 % slower to write on this machine, and 1.6 % worse at predicting unseen text."
    )


def test_compare_prefers_measured_ratios_and_knows_directions():
    results = pair({"decode_tokens_per_s": (1.7, 2.2)}, decode_tokens_per_s=1.9, perplexity=1.5, weight_bytes=0.5)
    results["ratios"][0]["median"] = 2.0  # the median of the paired rounds is not the quotient of the medians
    changes = {c.metric: c for c in compare(results)}
    assert changes["decode_tokens_per_s"][4:] == (2.0, 1.7, 2.2)
    assert changes["perplexity"][4:] == (1.5, None, None)
    assert {m: c.verdict for m, c in changes.items()} == {"decode_tokens_per_s": "better", "perplexity": "worse", "weight_bytes": "better"}
    assert [c.interval for c in changes.values()] == ["no interval", "1.70 to 2.20", ""]  # in the order of the table
    assert compare(results, to="a", origin="a") == compare(results, to="nobody") == []


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, "x", True])
def test_compare_leaves_out_what_is_no_number(bad):
    results = pair(perplexity=1.5, weight_bytes=0.5)
    results["variants"][1]["metrics"]["perplexity"]["value"] = bad
    results["variants"][0]["metrics"]["weight_bytes"]["value"] = 0
    assert compare(results) == []
    assert "–" in html(results) and "nan" not in html(results).lower().replace("nanosecond", "")


def test_figures_are_short_and_aligned():
    assert [times(r) for r in (0.49, 1.004, 1, 12.34, 250, 0.012)] == ["0.49x", "1.004x", "1.00x", "12.3x", "250x", "0.012x"]
    assert [percent(r) for r in (1.061, 0.985, 1.0004, 0.75, 1.02)] == ["6 %", "1.5 %", "less than 0.1 %", "25 %", "2 %"]
    assert [big(x) for x in (None, 0, 950, 1_500_000, 9.1e13, math.nan)] == ["–", "0", "950", "1.5 M", "91 T", "–"]
    assert [number(x) for x in (None, 1.23456, 15090.2)] == ["–", "1.235", "15,090"]
    shown = columns(
        {
            "variants": [
                variant("a", weight_bytes=13_640_704, perplexity=9.5, kl_to_teacher=0.0),
                variant("b", weight_bytes=6_688_896, kl_to_teacher=2e-5),
            ]
        }
    )
    unit, write = shown["weight_bytes"]
    assert (unit, write(13_640_704.0), write(6_688_896.0), write(None)) == ("MB", "13.64", "6.69", "–")
    assert shown["kl_to_teacher"][1](2e-5) == "2.0e-05" and shown["kl_to_teacher"][1](0.0) == "0.000"
    assert list(shown) == ["perplexity", "kl_to_teacher", "weight_bytes"]


# Plots


@pytest.mark.parametrize("higher", [True, False])
def test_front_is_what_nobody_beats(higher):
    import random

    draw = random.Random(4)
    points = [Point(str(i), draw.randint(0, 6), draw.randint(0, 6)) for i in range(30)]

    def beaten(p):
        for q in points:
            as_good = q.y <= p.y and (q.x >= p.x if higher else q.x <= p.x)
            if as_good and (q.x, q.y) != (p.x, p.y):
                return True
        return False

    assert set(front(points, higher)) == {p for p in points if not beaten(p)}
    assert [p.x for p in front(points, higher)] == sorted(p.x for p in front(points, higher))


def test_names_in_a_plot_are_text_not_formulas():
    names = ["$\\frac{$", "$x$ & <b>", "\U0001f600"]
    plot = scatter([Point(name, i, i) for i, name in enumerate(names, 1)], "x", "y", higher=True)
    shown = re.findall(r">([^<]+)</text>", plot)
    assert {escape(name, quote=False) for name in names} <= set(shown)


# The page


class Page(HTMLParser):
    """Tags, attributes and text of a page; fails on a tag that is not closed where it was opened."""

    VOID = ("meta", "br")

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = set(), [], "", []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *a) for a in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += [(tag, *a) for a in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


TAGS = "html head meta title style body main div h1 h2 h3 p b span small code pre ul li dl dt dd table thead tbody tr th td"
TAGS += " details summary section figure figcaption a svg g defs path text use"
HTML = set(TAGS.split())


def test_page_is_whole_and_loads_nothing(full):
    source = html(full)
    page = Page(source)
    assert page.tags <= HTML
    outside = [
        (tag, value) for tag, name, value in page.attributes if name in ("href", "src", "data", "action") and not value.startswith("#")
    ]
    assert outside == [("a", "https://arxiv.org/abs/1503.02531"), ("a", "https://arxiv.org/abs/2402.02750")]
    assert source.count("http") == sum("http" in value for _, value in outside) + source.count("http-equiv")
    assert not re.search(r"@import|url\((?!#)|javascript", source)
    assert "prefers-color-scheme: dark" in source and "default-src 'none'" in source
    assert not re.search(r"#01020\d", source), "a colour of the drawing is left"


def test_page_says_everything(full):
    page = Page(html(full))
    shown = page.text.replace("\xa0", " ")
    assert words(full) in shown
    for v in full["variants"]:
        assert v["name"] in shown
    for text in (
        "Half the size (0.50x)",
        "heads were kept",
        "sink_window with speculative: no crop",
        "1 of 1 held",
        "✓ held",
        full["recipe"].strip(),
    ):
        assert text in shown
    for text in (
        "2 min 30 s",
        "1.5 M",
        "91 T",
        "reused",
        "made now",
        "abc123",
        "2.13.0",
        "a CPU",
        "7.8 GB",
        "49 of 49",
        "stages/forward_kl-2",
    ):
        assert text in shown
    assert shown.count("heads were kept") == 1, "a warning that both the run and its stage report is shown once"
    assert "from_pretrained(folder)" in shown
    tips = [value for tag, name, value in page.attributes if name == "title"]
    assert "2.00x, 1.90 to 2.10: better" in tips and "0.50x, better" in tips
    assert page.text.count("minitron: 2.4") == 2, "far off, so at the edge of both plots with its value"


def test_curves_of_a_stage_are_drawn_and_named(full):
    told = {"step": [0, 4, 8], "train_proxy": [1.6, 0.9, 0.3], "golden": [1.7, 1.5, 2.4]}
    plain = html(full)
    full["stages"][1]["report"] = {"curves": told}
    page = html(full)
    assert ">train proxy<" in page and ">golden<" in page
    assert page.count("<svg") == plain.count("<svg") + 1
    full["stages"][1]["report"] = {"curves": told | {"golden": [1.7]}}  # not one figure for each step: no plot, no error
    assert html(full).count("<svg") == plain.count("<svg")


def test_branches_of_a_fork_are_ranked_by_quality_and_paired_by_seed():
    def branch(name, values):
        made = variant(name, parent="base", bits_per_byte=sum(values) / len(values), kl_to_teacher=0.1)
        made["metrics"]["bits_per_byte"]["seeds"] = values
        return made

    made = [variant("base", bits_per_byte=1.0), branch("slow", [2.0, 2.2]), branch("best", [1.0, 1.2]), branch("near", [1.1, 1.15])]
    page = html({"variants": made})
    table = page[page.index("<h2>Ranking</h2>") :]
    assert table.index("best") < table.index("near") < table.index("slow")
    assert "1.83x to 2.00x" in table
    assert table.count("a tie in some seed") == 1 and table.index("near") < table.index("a tie") < table.index("slow")
    assert "<h2>Ranking</h2>" not in html({"variants": made[:3]})  # two branches: the table above says it


def test_what_the_run_is_about_and_its_seeds_are_said(full):
    page = html(full | {"about": "Which <objective>?", "seeds": [3, 4, 5]})
    assert "Which &lt;objective&gt;?" in page and "Means over seeds 3, 4, 5" in page
    assert "Means over seeds" not in html(full)


def test_best_of_a_column_is_marked_with_its_equals(full):
    def marked():
        rows = re.findall(r"<tr[^>]*><th>([^<]+)<small>(.*?)</tr>", html(full))
        return {(name, text) for name, row in rows for text in re.findall(r'<td class="best[^>]*><span>(.*?)</span>', row)}

    assert {("base", "1.200"), ("kivi(bits=2)", "0.768"), ("forward_kl", "400"), ("minitron", "400")} <= marked()
    assert ("kivi(bits=2)", "300") not in marked() and ("base", "200") not in marked()
    full["variants"][1]["metrics"]["decode_tokens_per_s"]["value"] = 410  # faster, but within the interval of forward_kl
    next(r for r in full["ratios"] if r["metric"] == "decode_tokens_per_s").update(median=2.05, low=1.95, high=2.15)
    assert {("forward_kl", "400"), ("minitron", "410")} <= marked()
    next(r for r in full["ratios"] if r["metric"] == "decode_tokens_per_s").update(low=2.11)
    assert ("forward_kl", "400") not in marked() and ("minitron", "410") in marked()


def test_page_is_the_same_for_the_same_results(full):
    assert html(full) == html(json.loads(json.dumps(full)))


HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> $\\frac{ </style></svg> `` | ${} \U0001f600"


def poisoned(value):
    """The same results with the hostile text behind every string, but for those that name kinds and links."""
    if isinstance(value, dict):
        kept = ("better", "kind", "metric")
        out = {k: v if k in kept else poisoned(v) for k, v in value.items()}
        if "link" in out:
            out["link"] = "javascript:alert(1)//" + HOSTILE
        if "metrics" in out:
            out["metrics"][HOSTILE] = {"value": 1.0, "unit": HOSTILE, "better": "lower"}
        return out
    if isinstance(value, list):
        return [poisoned(v) for v in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_hostile_text_stays_text(full):
    bad = poisoned(full)
    page = Page(html(bad))
    assert page.tags <= HTML
    assert not [a for a in page.attributes if a[1].startswith("on") or (a[1] == "href" and not a[2].startswith("#"))]
    for text in (bad["variants"][1]["name"], bad["recipe"], bad["warnings"][0], bad["stages"][1]["papers"][0]["title"]):
        assert text.strip() in page.text
    card = model_card(bad, bad["variants"][3]["name"])
    outside = re.sub(r"(`{3,}).*?\1", "", card.split("---", 2)[2], flags=re.S)
    assert "<script" not in re.sub(r"`[^`]*`|<code>.*?</code>", "", outside)
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    Console(file=io.StringIO(), width=80).print(table(bad))


def test_a_link_cannot_break_out_of_its_attribute(full):
    full["stages"][1]["papers"] = [{"title": "x", "link": 'https://a.b/"onmouseover="alert(1)', "where": ""}]
    assert not [a for a in Page(html(full)).attributes if a[1].startswith("on")]
    assert "](<" not in model_card(full, "forward_kl").split("## Papers")[1]


LEVEL, BROKEN = {"bits_per_byte": 1.0, "decode_tokens_per_s": 5.0}, {"bits_per_byte": 0.0, "decode_tokens_per_s": 0.0}
SMALL = {
    "nothing": {},
    "one variant": {"variants": [variant("base", text="embedded", perplexity=3.0)]},
    "no metrics": {"variants": [variant("base"), variant("other", parent="base")]},
    "null parts": dict.fromkeys(("ratios", "stages", "headline", "expect", "seconds", "recipe"))
    | {"variants": [{"name": "x"}, {"name": "y"}]},
    "null metrics": {"variants": [{"name": "x", "metrics": None}, {"name": "y", "metrics": {"perplexity": None}}]},
    "lost headline": {"headline": {"from": "gone"}, "variants": [variant("a", perplexity=2.0), variant("b", perplexity=math.nan)]},
    "a stage that broke off": {"stages": [{"name": "s", "log": [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 2.0}]}]},
    "one loss at step 0": {"stages": [{"name": "s", "log": [{"step": 0, "loss": 2.0}, {"step": 0, "loss": 2.0}]}]},
    "all equal": {"variants": [variant("a", **LEVEL), variant("b", **LEVEL)]},
    "zero": {"variants": [variant("a", **BROKEN), variant("b", **LEVEL), variant("c", **BROKEN)]},
    "its own parent": {"variants": [variant("a", parent="a", kind="cache"), variant("b", parent="a")]},
}


@pytest.mark.parametrize("case", SMALL)
def test_minimal_results(case):
    results = copy.deepcopy(SMALL[case])
    assert Page(html(results)).tags <= HTML
    Console(file=io.StringIO(), width=80).print(table(results, "r.html"))
    for v in results.get("variants", []):
        assert model_card(results, v["name"]).startswith("---\n")
    assert repr(results) == repr(SMALL[case]), "the results are not touched"


# The terminal


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_table_fits_and_ends_with_the_words_and_the_path(full, width):
    out = io.StringIO()
    Console(file=out, width=width).print(table(full, "runs/quick/report.html"))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = " ".join(out.getvalue().split())
    assert text.endswith(f"{words(full)} Report: runs/quick/report.html")
    for v in full["variants"]:
        assert v["name"] in text
    assert "2.00x [1.90, 2.10]" in text and "0.50x" in text
    assert ("in the report" in text) == (width < 120)


# The model card


def test_model_card(full):
    card = model_card(full, "forward_kl")
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["smelt", "compression", "distillation"]}
    assert (
        "1. weights: `minitron(layers=4)`, 14 s\n   - warning: heads were kept\n2. distill: `forward_kl()`, 1.5 M tokens, 2 min 30 s\n"
        in card
    )
    assert words(full, "forward_kl", "base") in card
    assert "| Bits per byte | 1.200 | 1.260 | 1.05x | 1.04 to 1.06 |" in card and "| Weights, MB | 14.00 | 7.00 | 0.50x |  |" in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card and "```yaml\nname: quick\n" in card
    assert "- [Knowledge Distillation](<https://arxiv.org/abs/1503.02531>), section 2\n" in card and "KIVI" not in card


def test_model_card_of_a_runtime_variant_loads_with_smelt(full):
    full["variants"][0]["text"], full["license"] = "owner/model", "apache-2.0"
    card = model_card(full, "kivi(bits=2)")
    assert 'smelt.load("path/to/this/folder", cache="kivi(bits=2)")' in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "owner/model" and front["license"] == "apache-2.0"
    assert card.count("Knowledge Distillation") == 1 and "KIVI" in card


def test_recipe_with_a_fence_does_not_end_its_block(full):
    full["recipe"] = "name: x # ```\n````\n"
    assert "`````yaml\nname: x # ```\n````\n`````\n" in model_card(full, "forward_kl")


# docs/methods.md


def test_methods_page():
    abouts = [
        About("cache", "kivi", "Kivi", "x | y < `2`", "KIVI", "arXiv:2402.02750", "algorithm 1", (("bits", "2"), ("corpus", "")), ""),
        About("weights", "rtn", "Rtn", "round", "", "", "", (), ""),
    ]
    figure = {"text": "a <= b", "held": False, "left": 2.0, "right": 1.0}
    entries = [
        {"name": "kivi", "family": "cache", "when": "2025-11-22T08:00", "held": False, "figures": [figure]},
        {"name": "kivi", "family": "cache", "when": "2025-11-21T08:00", "held": True, "figures": []},
        {"name": "rtn", "family": "weights", "when": "2025-11-20", "held": True, "figures": [], "changed": {"tokens": "100"}},
    ]  # fmt: skip
    page = methods_page(abouts, entries)
    start = "| `kivi` | x \\| y &lt; `2` | [KIVI](<https://arxiv.org/abs/2402.02750>), algorithm 1 | `bits=2`<br>`corpus` |"
    assert f"{start} **not held**, 2025-11-22<br>`a <= b`: 2 against 1 |" in page.splitlines()
    assert "| `rtn` | round |  |  | held, 2025-11-20, with `tokens=100` |" in page.splitlines()
    assert page.index("## cache") < page.index("## weights")
    assert "not measured yet" in methods_page(abouts[:1], [])


def test_methods_page_of_this_package_has_a_row_for_each_method():
    from smelt.spec import FAMILIES

    abouts = [registry.about(f, n) for f in FAMILIES for n in registry.names(f)]
    rows = [line for line in methods_page(abouts, []).splitlines() if line.startswith("| `")]
    assert len(rows) == len(abouts) > 0
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {7}


def test_report_imports_neither_torch_nor_matplotlib():
    code = "import sys, smelt.report; print([m for m in ('torch', 'transformers', 'matplotlib', 'yaml', 'rich') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
