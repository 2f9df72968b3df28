"""A small model trained here as a reranker: `python benchmarks/rerank.py --minilm FOLDER`, hours on one core; --quick: seconds.

BM25 finds 100 functions for each of `--queries` docstrings of held-out modules of the standard library (`code_search`); each row
is another order of these 100. For each of three seeds, by a recipe that is written into the run folder, and resumable:

    warm start    the embedded model trained as a bi-encoder with in-batch negatives, `--warm` tokens
    listwise      block_rank from that checkpoint, `--tokens` tokens: all 100 in one pass
    pointwise     the same start, lists and tokens: one passage after another

beside BM25, a random order (expected), the oracle (the function first wherever BM25 found it) and, without seeds,
all-MiniLM-L6-v2 (`--minilm`). Its published training had code search pairs, so it is a reference judge and no proof that anything
generalises. `--untrained` adds what the judges read before their own training: the embedded model asked by query likelihood, and
the warm start asked as the judges.

`--judges` trains others in the place of these two, such as "permutation_text()": from the same start, on the same lists, with equal
`--tokens` and `--lr` or each with its own; what a training took is printed. Listwise judges that have learned nothing keep the
order they are shown, and BM25's is a good one: `--shuffle` shows another, drawn for each query.

Every row reads `--length` tokens of a passage, MiniLM 256. Printed: nDCG@10, mean over seeds with their standard deviation, and the
difference to the row `--to` after averaging over the seeds, paired by query: 95 % bootstrap interval, p of sign flips with Holm's
correction over the rows. 200 queries tell differences of about 0.05. Cost of one seed with the defaults: about 460,000
trained positions, and the reading of 20,000 passages by each of three judges. Answers are kept in a journal, trainings in
checkpoints: a call after a kill goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from smelt import registry, run
from smelt.data._code_search import by_chance, candidates, functions, held_out, ndcg
from smelt.model._load import Loaded, load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Retriever
from smelt.ranking import _holm, _resampled, rank_queries

RECIPE = """\
name: rerank
model: {model}
seeds: {seeds}
stages:
  - rank: {warm}
    train: {{data: {pairs}, tokens: {warm_tokens}, context: {pair_context}, batch: {pair_batch}, lr: {warm_lr}, precision: {precision}}}
  - rank: {judges}
    train: {{data: {lists}, tokens: {tokens}, context: {context}, batch: {batch}, lr: {lr}, precision: {precision}}}
evaluate: []
"""
QUICK = "stdlib(packages=('json', 'email'))"


def methods(asked: argparse.Namespace) -> tuple[str, list[str]]:
    """The texts of the warm start and of the judges."""
    two = [f"block_rank(aux={asked.aux}, length={asked.length})", f"pointwise(length={asked.length + asked.query})"]
    warm, *judges = (registry.text(registry.parse(said, "rank")) for said in (f"embedding(length={asked.length})", *(asked.judges or two)))
    return warm, judges


def recipes(asked: argparse.Namespace, corpus: str) -> list[str]:
    """One for all judges that train alike."""
    warm, judges = methods(asked)
    alike: dict[tuple[int, float], list[str]] = {}
    for judge, tokens, lr in zip(judges, each(asked.tokens, judges), each(asked.judge_lr or [asked.lr], judges), strict=True):
        alike.setdefault((tokens, lr), []).append(judge)
    return [recipe(asked, corpus, warm, some, *how) for how, some in alike.items()]


def each(said: Sequence[Any], judges: Sequence[str]) -> Sequence[Any]:
    return list(said) * len(judges) if len(said) == 1 else said


def recipe(asked: argparse.Namespace, corpus: str, warm: str, judges: Sequence[str], tokens: int, lr: float) -> str:
    own = 16  # positions of a passage's marks
    values = {
        "model": asked.model,
        "seeds": list(range(asked.seeds)),
        "warm": warm,
        "judges": judges,
        "pairs": f"code_pairs(corpus={corpus}, passages=2, hard=1.0)",
        "lists": f"code_pairs(corpus={corpus}, passages={asked.passages}, hard=0.5)",
        "pair_context": 3 * asked.length,
        "context": asked.passages * (asked.length + own) + 3 * asked.query,
        "warm_lr": asked.lr,
        "lr": lr,
        "precision": asked.precision,
        "warm_tokens": asked.warm,
        "tokens": tokens,
        "pair_batch": asked.pair_batch,
        "batch": asked.batch,
    }
    return RECIPE.format(**{key: json.dumps(value) for key, value in values.items()})


def ordered(model: Loaded, method: str, found: dict[int, tuple[int, ...]], journal: Path, tokens: int | None = None) -> list[float]:
    """nDCG@10 of each query. A retriever reads the different passages of all queries once; others ask a few queries at a time.
    `tokens`: passages are cut to them beforehand, as not every judge counts in tokens."""
    every, judge = functions(), registry.parse(method, "rank")
    asked = [(every[q].query, [every[i].passage for i in first]) for q, first in found.items()]
    if tokens is not None:
        ids = [model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] for _, texts in asked]
        asked = [(query, [model.tokenizer.decode(row[:tokens]) for row in rows]) for (query, _), rows in zip(asked, ids, strict=True)]
    batch = len(asked) if isinstance(judge, Retriever) else 8
    answers = rank_queries(model, asked, judge, batch=batch, journal=journal)
    return ndcg({q: [found[q][r.place] for r in one] for q, one in zip(found, answers, strict=True)})


def compared(rows: dict[str, list[list[float]]], first: str) -> list[dict[str, Any]]:
    """{row: samples of each seed} -> what is printed of it. Seeds are averaged before anything is tested over queries."""
    means = {name: np.mean(seeds, 0) for name, seeds in rows.items()}
    tested = [name for name in rows if name not in (first, "oracle", "random order")]
    differences = np.stack([values - means[first] for values in means.values()], 1)
    low, high, p = _resampled(differences, 10_000, 0)
    places = {name: at for at, name in enumerate(rows)}
    corrected = dict(zip(tested, _holm(p[[places[name] for name in tested]]).tolist(), strict=True)) if tested else {}
    lines = []
    for name, at in places.items():
        each = [float(np.mean(seed)) for seed in rows[name]]
        line = {"row": name, "ndcg10": statistics.mean(each), "seeds": each, "spread": statistics.stdev(each) if len(each) > 1 else None}
        line |= {"difference": float(differences[:, at].mean()), "low": float(low[at]), "high": float(high[at])}
        lines.append(line | {"p": corrected.get(name), "samples": rows[name]})
    return lines


def table(lines: list[dict[str, Any]], first: str) -> str:
    rows = [("order", "nDCG@10", "sd of seeds", f"to {first}", "95 % interval", "p")]
    for line in lines:
        beside = (f"{line['difference']:+.4f}", f"[{line['low']:+.4f}, {line['high']:+.4f}]") if line["row"] != first else ("", "")
        spread, p = (f"{line[key]:.4f}" if line[key] is not None else "" for key in ("spread", "p"))
        rows.append((line["row"], f"{line['ndcg10']:.4f}", spread, *beside, p))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))).rstrip() for row in rows)


def measured(asked: argparse.Namespace, corpus: str) -> list[dict[str, Any]]:
    asked.folder.mkdir(parents=True, exist_ok=True)
    warm, judges = methods(asked)
    file, journal = asked.folder / "rerank.yaml", asked.folder / "answers.jsonl"
    trained: dict[str, dict[Path, float]] = {
        method: {} for method in (warm, *judges)
    }  # {folder: seconds} of the first seed, the second, ...
    for text in recipes(asked, corpus):
        file.write_text(text, encoding="utf-8")
        for stage in run(file, folder=asked.folder)["stages"]:
            trained[stage["text"]][asked.folder / "rerank" / stage["folder"]] = stage["seconds"]
    for method, places in trained.items():
        print(f"{method}: trained in {', '.join(f'{seconds:.0f}' for seconds in places.values())} s", flush=True)

    found = {q: candidates(q, asked.candidates) for q in held_out(asked.queries)}
    inside = [float(q in first) for q, first in found.items()]
    rows: dict[str, list[list[float]]] = {"BM25": [ndcg(found)]}
    if asked.shuffle:
        found = {q: tuple(random.Random(q).sample(first, len(first))) for q, first in found.items()}
    cut = asked.length if asked.judges else None
    for method in trained:
        name = method + (" (warm start)" if method == warm else "")
        rows[name] = [ordered(load(folder), method, found, journal, cut) for folder in trained[method]]
        print(f"{name}: {', '.join(f'{np.mean(seed):.4f}' for seed in rows[name])}", flush=True)
    if asked.untrained:
        if not asked.judges:
            rows[f"{judges[1]} of {Path(asked.model).name}, untrained"] = [ordered(load(asked.model), judges[1], found, journal)]
        for method in judges:
            rows[f"{method} of the warm start"] = [ordered(load(folder), method, found, journal, cut) for folder in trained[warm]]
    if asked.minilm:
        rows["all-MiniLM-L6-v2"] = [ordered(load(asked.minilm), f"embedding(length={asked.minilm_length})", found, journal)]
    rows["oracle"] = [inside]
    rows["random order"] = [[by_chance(asked.candidates) * value for value in inside]]
    return compared(rows, asked.to)


def main(words: Sequence[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="embedded")
    ask.add_argument("--minilm", help="folder of all-MiniLM-L6-v2; the row is left out without one")
    ask.add_argument("--minilm-length", type=int, default=256)
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--queries", type=int, default=200)
    ask.add_argument("--candidates", type=int, default=100, help="of BM25, for each query")
    ask.add_argument("--warm", type=int, default=240_000, help="tokens of the warm start")
    ask.add_argument("--tokens", type=int, nargs="+", default=[110_000], help="of each judge, or one number for all")
    ask.add_argument("--passages", type=int, default=4, help="of a list in training")
    ask.add_argument("--length", type=int, default=64, help="tokens of a passage")
    ask.add_argument("--query", type=int, default=24, help="tokens that are left for a query")
    ask.add_argument("--batch", type=int, default=4, help="lists of a step")
    ask.add_argument("--pair-batch", type=int, default=32, help="lists of a step of the warm start")
    ask.add_argument("--lr", type=float, default=5e-4)
    ask.add_argument("--judge-lr", type=float, nargs="+", help="of each judge, or one number for all, where it is not --lr")
    ask.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the trainings")
    ask.add_argument("--aux", type=float, default=1.0, help="weight of the attention's loss of block_rank")
    ask.add_argument("--judges", nargs="+", metavar="METHOD", help="what is trained in the place of block_rank and pointwise")
    ask.add_argument("--shuffle", action="store_true", help="show the candidates in a random order, not in BM25's")
    ask.add_argument("--to", default="BM25", metavar="ROW", help="what the rows are compared with: BM25 or one of --judges")
    ask.add_argument("--untrained", action="store_true", help="also what the judges read before their own training")
    ask.add_argument("--folder", type=Path, default=Path("runs/rerank"))
    ask.add_argument("--json", type=Path, default=Path("rerank.json"))
    ask.add_argument("--quick", action="store_true", help="a tiny random model, 2 seeds, 4 queries; its figures mean nothing")
    asked = ask.parse_args(words)
    asked.judges = [registry.text(registry.parse(judge, "rank")) for judge in asked.judges or ()]
    if asked.to != "BM25":
        asked.to = registry.text(registry.parse(asked.to, "rank"))
    if asked.to not in ("BM25", *asked.judges):
        ask.error(f"--to {asked.to} is neither BM25 nor one of --judges")
    count = len(asked.judges) or 2
    if len(asked.tokens) not in (1, count) or len(asked.judge_lr or [0]) not in (1, count):
        ask.error(f"--tokens and --judge-lr are one number or {count}, one for each judge")
    with tempfile.TemporaryDirectory() as place:
        corpus = "stdlib()"
        if asked.quick:
            small = {"seeds": 2, "queries": 4, "candidates": 10, "warm": 600, "tokens": [600], "length": 16, "pair_batch": 4, "batch": 2}
            small["length"] = 48 if asked.judges else 16  # a written order needs room for its prompt
            vars(asked).update(small, model=f"{place}/tiny", folder=Path(place, "run"), untrained=True)
            save(tiny("llama", context=512), tiny_tokenizer(context=512), Path(asked.model))
            corpus = QUICK
        lines = measured(asked, corpus)
    print(table(lines, asked.to))
    shown = "shown in a random order" if asked.shuffle else "shown in BM25's order"
    print(f"{asked.queries} queries, {asked.candidates} candidates each, {shown}, {asked.seeds} seeds")
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    asked.json.write_text(json.dumps({"asked": said, **about, "results": lines}, indent=1, allow_nan=False))
    print(f"all samples in {asked.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
