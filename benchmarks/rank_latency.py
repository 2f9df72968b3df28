"""Seconds to order 100 passages with one and the same model: `python benchmarks/rank_latency.py`, about four minutes on one core.

    permutation_text    through sliding_window: the whole order of each window is written out; what the others are compared with
    first_token         through the same windows: one row of logits each
    self_calibrated     through disjoint_merge: windows that do not wait for each other
    block_rank          all passages in one pass, up to the middle of the model, or as `--block-rank` says

One question at a time, BM25's first 100 functions of `code_search`, each cut to `--tokens` tokens beforehand, so that all judges are
given the same text. In every round one question goes to all of them, in another order each round; printed are the judge's
calls, those that wait for each other, the median seconds, and permutation_text / judge: the median of the paired ratios with its
95 % bootstrap interval. Goal: at least 10 for those that read a passage once.

Then block_rank on N passages of exactly `--tokens` tokens, all N in turns in every round: seconds, seconds of a passage, and the
slope of log seconds over log N, fitted round by round, its median with the interval (1 is linear).

Times do not depend on what the model has learned. `--quality Q` also measures nDCG@10 over Q held-out questions, with the paired
difference to permutation_text; give `--model` a checkpoint that was trained to rank, such as a stage of benchmarks/rerank.py. A
judge is good with a model trained for it only: block_rank of a block_rank checkpoint beside permutation_text of the same one
compares no two trained judges. self_calibrated has new heads unless `--heads` names the folder of its training, and
without them no quality.
"""

from __future__ import annotations

import argparse
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

from smelt import registry
from smelt.data._code_search import candidates, functions, held_out, ndcg
from smelt.evaluate import Metric
from smelt.evaluate._measure import ratio
from smelt.model._load import Loaded, load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Asked, Strategy
from smelt.rank._order import order
from smelt.rank._training import write
from smelt.rank.self_calibrated import SelfCalibrated
from smelt.ranking import _resampled

FIRST = "permutation_text"


def one_pass(asked: argparse.Namespace) -> str:
    return f"block_rank(length={2 * asked.tokens}{asked.block_rank and ', ' + asked.block_rank})"


def methods(asked: argparse.Namespace, heads: str) -> dict[str, str]:
    """As in a recipe. The texts are cut before they are asked, so no judge cuts them further, unless its context is too short."""
    windows = f"window={asked.window}, step={asked.window // 2}"
    length = 2 * asked.tokens  # cut text splits into a few tokens more where it is joined to other text
    return {
        FIRST: f"sliding_window(judge=permutation_text(), {windows})",
        "first_token": f"sliding_window(judge=first_token(), {windows})",
        "self_calibrated": f"disjoint_merge(judge=self_calibrated(length={length}, weights={heads!r}), window={asked.window})",
        "block_rank": one_pass(asked),
    }


def cut(texts: Sequence[str], tokenizer: Any, tokens: int, exact: bool = False) -> list[str]:
    """Texts on one line, their first `tokens` tokens; with `exact` only those that have as many."""
    ids = tokenizer([" ".join(text.split()) for text in texts], add_special_tokens=False, verbose=False)["input_ids"]
    return [tokenizer.decode(row[:tokens], skip_special_tokens=True) for row in ids if not exact or len(row) >= tokens]


def seconds(method: Any, one: Asked, model: Loaded) -> float:
    began = time.perf_counter()
    order(method, [one], model)
    return time.perf_counter() - began


def in_turns(methods: Sequence[Any], asked: Sequence[Sequence[Asked]], model: Loaded) -> list[tuple[float, ...]]:
    """Of each method its seconds in every round, the first left out. asked[round][method]; another one begins in each round."""
    found: list[list[float]] = [[] for _ in methods]
    for round_, ones in enumerate(asked):
        for turn in range(len(methods)):
            at = (round_ + turn) % len(methods)
            spent = seconds(methods[at], ones[at], model)
            if round_:
                found[at].append(spent)
    return [tuple(each) for each in found]


def timing(name: str, samples: tuple[float, ...]) -> Metric:
    return Metric(name, statistics.median(samples), "s", "lower", samples)


def judges(asked: argparse.Namespace, model: Loaded, heads: str) -> list[dict[str, Any]]:
    every = functions()
    queries = held_out(max(asked.quality, asked.rounds + 1))
    found = {q: candidates(q, asked.passages) for q in queries}
    questions = {q: Asked(every[q].query, cut([every[i].passage for i in found[q]], model.tokenizer, asked.tokens)) for q in queries}
    texts = methods(asked, heads)
    made = {name: registry.parse(text, "rank") for name, text in texts.items()}
    rounds = [[questions[q]] * len(made) for q in queries[: asked.rounds + 1]]
    times = dict(zip(made, in_turns(list(made.values()), rounds, model), strict=True))
    lines: list[dict[str, Any]] = []
    for name, method in made.items():
        n = asked.passages
        calls, chain = (method.calls(n), method.chain(n)) if isinstance(method, Strategy) else (1, 1)
        line = {"judge": name, "method": texts[name], "calls": calls, "chain": chain, "seconds": statistics.median(times[name])}
        lines.append(line | {"faster": ratio(timing(FIRST, times[FIRST]), timing(name, times[name])), "samples": times[name]})
    if asked.quality:
        for line in lines:
            if line["judge"] == "self_calibrated" and not asked.heads:
                continue
            orders = {}
            for q in queries[: asked.quality]:
                (places,) = order(made[line["judge"]], [questions[q]], model)
                orders[q] = [found[q][i] for i in places]
            line["queries"] = ndcg(orders)
            low, high, p = _resampled(np.array([line["queries"]]).T - np.array([lines[0]["queries"]]).T, 10_000, 0)
            line |= {"ndcg10": float(np.mean(line["queries"])), "to_first": [float(low[0]), float(high[0])], "p": float(p[0])}
    return lines


def scaling(asked: argparse.Namespace, model: Loaded) -> dict[str, Any]:
    """block_rank's seconds by the number of passages."""
    most, long = max(asked.numbers), []
    every = functions()
    for function in every:
        long += cut([function.passage], model.tokenizer, asked.tokens, exact=True)
        if len(long) >= most:
            break
    if len(long) < most:
        raise SystemExit(f"only {len(long)} functions have {asked.tokens} tokens; ask for fewer passages or tokens")
    query = every[held_out(1)[0]].query
    method = registry.parse(one_pass(asked), "rank")
    ones = [Asked(query, long[:n]) for n in asked.numbers]
    times = in_turns([method] * len(ones), [ones] * (asked.rounds + 1), model)
    slopes = tuple(float(np.polyfit(np.log(asked.numbers), np.log(round_), 1)[0]) for round_ in zip(*times, strict=True))
    one = Metric("exponent", 1.0, "", "lower", (1.0,) * len(slopes))
    exponent = ratio(Metric("exponent", statistics.median(slopes), "", "lower", slopes), one)
    return {"numbers": asked.numbers, "seconds": times, "exponent": exponent, "slopes": slopes}


def shown(lines: list[dict[str, Any]], grown: dict[str, Any], asked: argparse.Namespace) -> str:
    text = [
        f"{asked.passages} passages of up to {asked.tokens} tokens",
        f"{'judge':18}{'calls':>6}{'chain':>6}{'seconds':>10}  {FIRST} / judge",
    ]
    for line in lines:
        middle, low, high = line["faster"]
        row = f"{line['judge']:18}{line['calls']:6}{line['chain']:6}{line['seconds']:10.3f}  {middle:.2f} [{low:.2f}, {high:.2f}]"
        if "ndcg10" in line:
            low, high = line["to_first"]
            row += f"  nDCG@10 {line['ndcg10']:.4f}, difference [{low:+.4f}, {high:+.4f}], p {line['p']:.4f}"
        text.append(row)
    text.append(f"block_rank, {asked.tokens} tokens a passage")
    for n, times in zip(grown["numbers"], grown["seconds"], strict=True):
        middle = statistics.median(times)
        text.append(f"{n:6} passages {middle:9.3f} s, {1000 * middle / n:8.2f} ms a passage")
    middle, low, high = grown["exponent"]
    return "\n".join([*text, f"seconds grow with N to the power {middle:.3f} [{low:.3f}, {high:.3f}]"])


def main(words: Sequence[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="embedded")
    ask.add_argument("--heads", default="", help="folder with the judge.safetensors of self_calibrated; new ones without")
    ask.add_argument("--block-rank", default="", help="its other parameters, such as 'layer=1, order_free=True'")
    ask.add_argument("--passages", type=int, default=100)
    ask.add_argument("--tokens", type=int, default=64, help="of a passage")
    ask.add_argument("--window", type=int, default=20, help="a step is half of it")
    ask.add_argument("--numbers", type=int, nargs="+", default=[20, 50, 100, 200, 500], help="passages that block_rank is timed on")
    ask.add_argument("--rounds", type=int, default=7, help="that count; one goes before them")
    ask.add_argument("--quality", type=int, default=0, help="held-out questions for nDCG@10")
    ask.add_argument("--json", type=Path, default=Path("rank_latency.json"))
    ask.add_argument("--quick", action="store_true", help="a tiny random model, 6 passages, 2 rounds; its figures mean nothing")
    asked = ask.parse_args(words)
    if asked.quick:
        vars(asked).update(passages=6, tokens=8, window=4, numbers=[4, 8, 16], rounds=2, quality=2)
        model = Loaded(tiny("llama", context=1024), tiny_tokenizer(context=1024), None)
    else:
        model = load(asked.model)
    with tempfile.TemporaryDirectory() as place:
        if not asked.heads:
            torch.manual_seed(0)
            write(SelfCalibrated(), SelfCalibrated().heads(model.model.config.get_text_config()), Path(place))
        lines = judges(asked, model, asked.heads or place)
        grown = scaling(asked, model)
    print(f"{asked.model}, {torch.get_num_threads()} threads, {asked.rounds} rounds")
    print(shown(lines, grown, asked))
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    said = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    results = {"judges": lines, "scaling": grown}
    asked.json.write_text(json.dumps({"asked": said, **about, "results": results}, indent=1, allow_nan=False))
    print(f"all samples in {asked.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
