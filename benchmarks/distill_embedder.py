"""Two layers of all-MiniLM-L6-v2: `python benchmarks/distill_embedder.py --minilm FOLDER`, an hour on one core; --quick: seconds.

The student is made of the teacher's first and last layer (`--layers`), read after one and after both, which bracket a quarter of the
depth; `--ffn` keeps a share of the neurons of their feed-forward networks, as a quarter of six layers is less than two. Per seed
four arms on the same lists and tokens:

    margins    margin_mse: by how much the teacher prefers the documented function to others of BM25's
    vectors    vector_mse: the teacher's vectors of the same texts
    each as    multi_exit_embedding with both exits trained, and with the last alone

Vectors that are the teacher's can be asked with the teacher's: of an arm of vectors, "asked by the teacher" are passages of
the student and questions of the teacher, embedding(query_model=...). A question is one text, what is reordered is a hundred.

"mean weights": the seeds of an arm as one model, the mean of their weights (`linear` of the weights family), for the price of all.

The teacher is asked once for each text or list, not by every seed and arm. Its scores are cosines, hence `--scale` 20.

Measured on held-out questions of `code_search`: nDCG@10 of BM25's first 100 in the student's order, and of a search through all
functions; mean over seeds with their standard deviation; nDCG kept, the ratio to the teacher over queries, after averaging over the
seeds, with its 95 % bootstrap interval. Teacher and students read the same `--length` tokens of a text; the row "teacher, 256
tokens" is the teacher as it is meant (`--reference 0` leaves it out). passages/s: the same new texts for each depth in turns,
the median of the paired ratios to the teacher with the interval; who asks has a question read beside every `--timed` passages, the
teacher it is compared with has not. Goal: 95 % of nDCG at 3 times the speed.

`--corpus` trains on other functions than those of the standard library, which are asked for and searched as before; its lists are of
random functions, as vectors need no hard ones.

The teacher's published training had code search pairs, so its figures here are in-domain. Trainings go on after a kill; vectors
that were measured are not made again.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from smelt import registry, run
from smelt.data._code_search import by_chance, candidates, functions, held_out, ndcg
from smelt.evaluate import Metric
from smelt.evaluate._measure import ratio
from smelt.journal import Journal
from smelt.model._files import identity
from smelt.model._load import Loaded, load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks, linears, stack
from smelt.progress import track
from smelt.weights._merge import merge_folders
from smelt.weights.linear import Linear

RECIPE = """\
name: distill_embedder
model: {model}
seeds: {seeds}
stages:
  - rank: {arms}
    train:
      {{teacher: {teacher}, data: {lists}, tokens: {tokens}, context: {context}, batch: {batch}, lr: {lr},
        optimizer: {optimizer}, precision: {precision}}}
evaluate: []
"""
EXITS = (1, 2)
ARMS = ("margins, multi-exit", "margins, last only", "vectors, multi-exit", "vectors, last only")
TASKS = ("rerank", "search")
TEACHER, ASKED = "teacher", "asked by the teacher"
CALIBRATION = 512  # functions that say which neurons are kept


def cut(teacher: Loaded, layers: Sequence[int], folder: Path, ffn: float = 1.0, texts: Sequence[str] = ()) -> Path:
    """The teacher with these of its layers only, and a share `ffn` of their neurons, as a checkpoint."""
    if not (folder / "config.json").exists():
        model = copy.deepcopy(teacher.model)
        every, inner = blocks(model), stack(model)
        name = next(name for name, child in inner.named_children() if child is every)
        setattr(inner, name, torch.nn.ModuleList(every[at] for at in layers))
        model.config.num_hidden_layers = len(layers)
        if ffn < 1:
            narrow(model, teacher.tokenizer, ffn, texts)
        save(model, teacher.tokenizer, folder)
    return folder


@torch.no_grad()
def narrow(model: Any, tokenizer: Any, ffn: float, texts: Sequence[str]) -> None:
    """Keeps the neurons with the largest rms(a_i) |W_down[:, i]| over the tokens of the texts: minitron's rule, for an encoder."""
    wide = model.config.intermediate_size
    keep = round(ffn * wide)
    downs = [part for _, _, part in linears(model) if part.in_features == wide]
    ups = [part for _, _, part in linears(model) if part.out_features == wide]
    sums = [torch.zeros(wide, dtype=torch.float64) for _ in downs]
    batch: dict[str, torch.Tensor] = {}

    def hook(total: torch.Tensor) -> Any:
        def entered(_: Any, given: tuple[torch.Tensor]) -> None:
            total.add_((given[0].double().square() * batch["attention_mask"][..., None]).sum((0, 1)))

        return entered

    held = [down.register_forward_pre_hook(hook(total)) for down, total in zip(downs, sums, strict=True)]
    for at in range(0, len(texts), 64):
        batch.update(tokenizer(list(texts[at : at + 64]), return_tensors="pt", padding=True, truncation=True, max_length=64))
        model(**batch)
    for one in held:
        one.remove()
    for up, down, total in zip(ups, downs, sums, strict=True):
        kept = (total.sqrt() * down.weight.double().norm(dim=0)).topk(keep).indices.sort().values
        up.weight, up.bias = (torch.nn.Parameter(part[kept].clone()) for part in (up.weight, up.bias))
        down.weight = torch.nn.Parameter(down.weight[:, kept].clone())
        up.out_features = down.in_features = keep
    model.config.intermediate_size = keep


def averaged(places: Sequence[Path], folder: Path) -> Path:
    """The mean of the seeds' weights: they began at one student and lie near each other. Made once."""
    soup = folder / ("mean-" + hashlib.sha256(json.dumps([identity(place) for place in places]).encode()).hexdigest()[:12])
    if not soup.exists():
        with tempfile.TemporaryDirectory(dir=folder) as partial:
            merge_folders(Linear(models=tuple(map(str, places[1:]))), places, None, Path(partial) / "made")
            (Path(partial) / "made").rename(soup)
    return soup


def searched(asked: argparse.Namespace) -> np.ndarray:
    """Indices of the functions that are searched, rising: all of them, in quick mode those that are needed."""
    if not asked.quick:
        return np.arange(len(functions()))
    queries = held_out(asked.queries)
    return np.array(sorted({*queries, *(i for q in queries for i in candidates(q, asked.candidates))}))


def quality(embedder: Any, exits: Sequence[int | None], model: Loaded, asked: argparse.Namespace, kept: Journal) -> list[dict[str, Any]]:
    """Of each exit {task: nDCG@10 of each question}. One reading of the model up to the deepest."""
    every, queries = functions(), held_out(asked.queries)
    keys = [json.dumps([registry.text(embedder), at, identity(model.folder), asked.queries, asked.candidates]) for at in exits]
    if any(key not in kept for key in keys):
        pool = searched(asked)
        passages = embedder.layers([every[i].passage for i in pool], model, False, exits)
        questions = embedder.layers([every[q].query for q in queries], model, True, exits)
        for place, key in enumerate(keys):
            if key in kept:
                continue
            scores = (questions[:, place].double() @ passages[:, place].double().T).numpy()  # [questions, pool]
            orders: dict[str, dict[int, list[int]]] = {task: {} for task in TASKS}
            for q, row in zip(queries, scores, strict=True):
                first = np.array(candidates(q, asked.candidates))
                given = row[np.searchsorted(pool, first)]
                orders["rerank"][q] = first[np.argsort(-given, kind="stable")].tolist()
                orders["search"][q] = pool[np.argsort(-row, kind="stable")[:100]].tolist()
            kept.put(key, {task: ndcg(orders[task]) for task in TASKS})
    return [kept[key] for key in keys]


def speeds(teacher: Loaded, student: Loaded, asked: argparse.Namespace) -> dict[str, Metric]:
    """Passages per second of each depth, new texts in every round, in turns. Weights do not matter: one student serves all."""
    texts = [f.passage for f in functions()]
    last = int(teacher.model.config.num_hidden_layers)
    embedder = registry.parse(f"embedding(length={asked.length})", "rank")
    names: dict[str, tuple[Loaded, int]] = {TEACHER: (teacher, last), **{f"exit {at}": (student, at) for at in EXITS}}
    names[ASKED] = names[f"exit {EXITS[-1]}"]
    found: dict[str, list[float]] = {name: [] for name in names}
    with track("timing", asked.rounds + 1, "rounds") as bar:
        for round_ in range(asked.rounds + 1):  # the first warms up
            some = [texts[(round_ * asked.timed + i) % len(texts)] for i in range(asked.timed)]
            for turn in range(len(names)):
                name = list(names)[(round_ + turn) % len(names)]
                model, at = names[name]
                began = time.perf_counter()
                embedder.layers(some, model, False, (at,))
                if name == ASKED:
                    embedder.layers([functions()[held_out(asked.queries)[round_ % asked.queries]].query], teacher, True, (None,))
                if round_:
                    found[name].append(len(some) / (time.perf_counter() - began))
            bar.advance()
    return {name: Metric(name, statistics.median(each), "passages/s", "higher", tuple(each)) for name, each in found.items()}


def share(above: Metric, below: Metric) -> list[float] | None:
    """Their ratio with its interval; None where the lower one is zero."""
    found = ratio(above, below) if below.value else None
    return list(found) if found is not None and np.isfinite(found).all() else None


def written(found: Sequence[float] | None) -> str:
    return "-" if found is None else "{:.3f} [{:.3f}, {:.3f}]".format(*found)


def over_queries(seeds: Sequence[Sequence[float]]) -> Metric:
    mean = np.mean(seeds, 0)
    return Metric("nDCG@10", float(mean.mean()), "nDCG@10", "higher", tuple(mean.tolist()), (1.0,) * len(mean))


def measured(asked: argparse.Namespace, corpus: str) -> tuple[list[dict[str, Any]], dict[str, Metric]]:
    asked.folder.mkdir(parents=True, exist_ok=True)
    teacher = load(asked.minilm)
    last = int(teacher.model.config.num_hidden_layers)
    said = "-".join(map(str, [*(at % last for at in asked.layers), *([asked.ffn] if asked.ffn < 1 else [])]))
    texts = [f.passage for f in registry.parse(corpus, "data").functions("train")[:CALIBRATION]] if asked.ffn < 1 else []
    student = cut(teacher, asked.layers, asked.folder / f"student-{said}", asked.ffn, texts)
    length, labels = f"length={asked.length}", f"labels=embedding(length={asked.length})"
    margin = f"margin_mse(judge=embedding(normalize=False, {length}{{layer}}), scale={asked.scale}{{labels}})"
    vector = f"vector_mse(judge=embedding({length}{{layer}}){{labels}})"
    arms: dict[str, str] = {}
    for name, loss in (("margins", margin), ("vectors", vector)):
        several = loss.format(layer="", labels="")
        arms[f"{name}, multi-exit"] = f"multi_exit_embedding(judge={several}, exits={EXITS}, {labels})"
        arms[f"{name}, last only"] = loss.format(layer=f", layer={EXITS[-1]}", labels=f", {labels}")
    arms = {name: arm for name, arm in arms.items() if name in asked.arms}
    values = {
        "model": str(student),
        "teacher": str(asked.minilm),
        "seeds": list(range(asked.seeds)),
        "arms": list(arms.values()),
        "lists": corpus,
        "tokens": asked.tokens,
        "context": (1 + asked.passages) * asked.length,
        "batch": asked.batch,
        "lr": asked.lr,
        "optimizer": asked.optimizer,
        "precision": asked.precision,
    }
    file = asked.folder / "distill_embedder.yaml"
    file.write_text(RECIPE.format(**{key: json.dumps(value) for key, value in values.items()}), encoding="utf-8")
    results = run(file, folder=asked.folder)
    folders: dict[str, list[Path]] = {registry.text(registry.parse(arm, "rank")): [] for arm in arms.values()}
    for stage in results["stages"]:  # those of the first seed, of the second, ...
        folders[stage["text"]].append(asked.folder / "distill_embedder" / stage["folder"])
    print(f"{values['tokens']} tokens an arm and seed", flush=True)

    kept = Journal(asked.folder / "measured.jsonl")
    plain, raw = (registry.parse(f"embedding(normalize={normal}, length={asked.length})", "rank") for normal in (True, False))
    rows: dict[str, list[dict[str, list[float]]]] = {}
    (whole,) = quality(plain, (last,), teacher, asked, kept)
    rows[TEACHER] = [whole]
    if asked.reference:
        rows[f"{TEACHER}, {asked.reference} tokens"] = quality(
            registry.parse(f"embedding(length={asked.reference})", "rank"), (last,), teacher, asked, kept
        )
    for at, untrained in zip(EXITS, quality(plain, EXITS, load(student), asked, kept), strict=True):
        rows[f"untrained, exit {at}"] = [untrained]
    for arm, places in zip(arms, folders.values(), strict=True):
        exits = EXITS if arm.endswith("multi-exit") else EXITS[-1:]
        reads = raw if arm.startswith("margins") else plain
        each = [quality(reads, exits, load(place), asked, kept) for place in places]
        rows |= {f"{arm}, exit {at}": [seed[place] for seed in each] for place, at in enumerate(exits)}
        soup = averaged(places, asked.folder) if len(places) > 1 else None
        if soup:
            mean = quality(reads, exits, load(soup), asked, kept)
            rows |= {f"{arm}, mean weights, exit {at}": [mean[place]] for place, at in enumerate(exits)}
        if arm == "vectors, last only":
            above = registry.parse(f"embedding(length={asked.length}, query_model={str(asked.minilm)!r})", "rank")
            rows[f"{arm}, exit {exits[0]}, {ASKED}"] = [quality(above, exits, load(place), asked, kept)[0] for place in places]
            if soup:
                rows[f"{arm}, mean weights, exit {exits[0]}, {ASKED}"] = quality(above, exits, load(soup), asked, kept)

    found = {q: candidates(q, asked.candidates) for q in held_out(asked.queries)}
    inside = [float(q in first) for q, first in found.items()]
    bm25 = ndcg({q: candidates(q, max(asked.candidates, 10)) for q in found})
    rows["BM25"] = [dict.fromkeys(TASKS, bm25)]
    rows["oracle"] = [{"rerank": inside, "search": [1.0] * len(inside)}]
    chance = {
        "rerank": [by_chance(asked.candidates) * value for value in inside],
        "search": [by_chance(len(searched(asked)))] * len(inside),
    }
    rows["random order"] = [chance]
    lines = []
    for name, seeds in rows.items():
        line: dict[str, Any] = {"row": name}
        for task in TASKS:
            each = [float(np.mean(seed[task])) for seed in seeds]
            kept_share = share(over_queries([seed[task] for seed in seeds]), over_queries([whole[task]]))
            spread = statistics.stdev(each) if len(each) > 1 else None
            line[task] = {"ndcg10": statistics.mean(each), "seeds": each, "spread": spread, "kept": kept_share}
            line[task]["samples"] = [seed[task] for seed in seeds]
            alone = name.replace("multi-exit", "last only")
            if alone != name and alone in rows:
                other = over_queries([seed[task] for seed in rows[alone]])
                line[task]["to_last_only"] = share(over_queries([seed[task] for seed in seeds]), other)
        lines.append(line)
    return lines, speeds(teacher, load(student), asked)


def shown(lines: list[dict[str, Any]], fast: dict[str, Metric]) -> str:
    rows = [("embedder", *(title for task in TASKS for title in (f"{task} nDCG@10", "sd of seeds", "kept")), "passages/s, / teacher")]
    for line in lines:
        cells = [line["row"]]
        for task in TASKS:
            about = line[task]
            spread = "" if about["spread"] is None else f"{about['spread']:.4f}"
            cells += [f"{about['ndcg10']:.4f}", spread, written(about["kept"])]
        depth = line["row"].rpartition(", ")[2]
        gain = "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(fast[depth], fast[TEACHER])) if depth in fast and depth != TEACHER else ""
        rows.append((*cells, gain))
    wide = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    text = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))).rstrip() for row in rows]
    for line in lines:
        for task in TASKS:
            if "to_last_only" in line[task]:
                text.append(f"{task}: {line['row']} / last only, {written(line[task]['to_last_only'])}")
    return "\n".join([*text, "; ".join(f"{name} {metric.value:.1f} passages/s" for name, metric in fast.items())])


def main(words: Sequence[str] | None = None) -> int:
    ask_for = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask_for.add_argument("--minilm", help="folder of all-MiniLM-L6-v2")
    ask_for.add_argument("--seeds", type=int, default=3)
    ask_for.add_argument("--queries", type=int, default=200)
    ask_for.add_argument("--candidates", type=int, default=100, help="of BM25, for each query")
    ask_for.add_argument("--length", type=int, default=64, help="tokens of a text")
    ask_for.add_argument("--reference", type=int, default=256, help="tokens of the second row of the teacher; 0 leaves it out")
    ask_for.add_argument("--layers", type=int, nargs=2, default=(0, -1), help="of the teacher, that the student is made of")
    ask_for.add_argument("--ffn", type=float, default=1.0, help="share of the neurons of a feed-forward network that the student keeps")
    ask_for.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=f"of {ARMS}")
    ask_for.add_argument("--tokens", type=int, default=480_000, help="of each arm of a seed")
    ask_for.add_argument("--passages", type=int, default=4, help="of a list")
    ask_for.add_argument("--sentences", choices=("first", "all"), default="first", help="of a docstring, that ask for its function")
    ask_for.add_argument("--corpus", help="files to learn from instead of the standard library, such as 'site-packages/torch/**/*.py'")
    ask_for.add_argument("--batch", type=int, default=16, help="lists of a step")
    ask_for.add_argument("--lr", type=float, default=1e-3)
    ask_for.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    ask_for.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of the trainings")
    ask_for.add_argument("--scale", type=float, default=20.0, help="of the teacher's cosines")
    ask_for.add_argument("--timed", type=int, default=64, help="passages of one timing")
    ask_for.add_argument("--rounds", type=int, default=7, help="of timing")
    ask_for.add_argument("--folder", type=Path, default=Path("runs/distill_embedder"))
    ask_for.add_argument("--json", type=Path, default=Path("distill_embedder.json"))
    ask_for.add_argument("--quick", action="store_true", help="a tiny random teacher, 2 seeds, 4 queries; its figures mean nothing")
    asked = ask_for.parse_args(words)
    if not asked.quick and not asked.minilm:
        ask_for.error("name the folder of the teacher: --minilm FOLDER")
    with tempfile.TemporaryDirectory() as place:
        source = f", corpus=files(path={asked.corpus!r}), hard=0.0" if asked.corpus else ""
        corpus = f"code_pairs(passages={asked.passages}, sentences={asked.sentences!r}{source})"
        if asked.quick:
            small = {"seeds": 2, "queries": 4, "candidates": 10, "length": 16, "reference": 24, "tokens": 320, "batch": 2, "timed": 4}
            vars(asked).update(small, rounds=2, minilm=f"{place}/tiny", folder=Path(place, "run"))
            save(tiny("bert", layers=4), tiny_tokenizer(), Path(asked.minilm))
            corpus = f"code_pairs(corpus=stdlib(packages=('json', 'email')), passages={asked.passages})"
        lines, fast = measured(asked, corpus)
    print(shown(lines, fast))
    print(f"{asked.queries} queries, {asked.seeds} seeds, {asked.length} tokens of a text, {torch.get_num_threads()} threads")
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    results = {"rows": lines, "passages_per_second": {name: metric.samples for name, metric in fast.items()}}
    asked.json.write_text(json.dumps({"asked": said, **about, "results": results}, indent=1, allow_nan=False))
    print(f"all samples in {asked.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
