"""What block-sparse attention saves when a long prompt is read: `python benchmarks/prefill_sparse.py`, an hour and more; --quick: seconds.

Two models. `random`: Mistral's shape with at least 100 M parameters (12 layers, hidden 768, 12 heads of 64, 4 key/value heads, ffn 2,048,
32,000 tokens), untrained. Its attention is nearly uniform, so methods that choose by weight leave little out: read its
times at a fraction, not its fractions. `embedded`: trained, on held-out text of the standard library. It
has 2,048 positions: what is longer extrapolates, for sdpa too, and losses there compare methods, they say nothing of the model.

One call of the whole prompt at batch 1, keys and values kept, logits of the last token. Method and sdpa in turns (A B, B A, ...),
after one pair to warm up. Printed for each model, length and method:

    sdpa / method   seconds of sdpa over seconds of the method, median of the pairs with the 95 % bootstrap interval; above 1: faster
    computed        fraction of the causal pairs of blocks that were computed (1: none left out)
    nats            loss per token over the whole text, `embedded` alone, and its ratio to sdpa's with the interval over parts of 512 tokens
    nothing         attention that returns its queries: the ratio no attention method can pass; 1 - 1 / ratio is attention's share

Ends with a JSON file of all samples (`--json`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, MistralConfig, MistralForCausalLM
from transformers.masking_utils import sdpa_mask

from smelt.attention._executor import counting
from smelt.evaluate import Metric, Variant
from smelt.evaluate._measure import ratio
from smelt.evaluate._text import prompt
from smelt.model._load import load
from smelt.model._tiny import tiny
from smelt.runtime import bind

METHODS = (
    "pbs()", "pbs(threshold=0.7)", "pbs(threshold=0.4)", "flex_prefill()", "flex_prefill(gamma=0.7)", "block_sparse()",
    "block_sparse(stride=0)",
)  # fmt: skip
QUICK = ("pbs(block=16, segment=32, threshold=0.5)", "flex_prefill(block=16, gamma=0.5, min_budget=16)", "block_sparse(block=16, local=1)")
PART = 512  # tokens of a part of the text, the parts that intervals of losses are drawn over
NOTHING = "nothing"


def free(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    return query.transpose(1, 2).contiguous(), None


@contextmanager
def attention(model: Any, method: str | None) -> Iterator[None]:
    """None: transformers' sdpa."""
    if method == NOTHING:
        model.set_attn_implementation("smelt_benchmark_nothing")
        try:
            yield
        finally:
            model.set_attn_implementation("sdpa")
    elif method is None:
        yield
    else:
        with bind(model, attention=method):
            yield


@torch.no_grad()
def seconds(model: Any, ids: torch.Tensor, method: str | None) -> float:
    with attention(model, method):
        began = time.perf_counter()
        model(ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor, method: str | None) -> Metric:
    with attention(model, method):
        logits = model(ids, use_cache=False).logits[0, :-1]
    parts = zip(logits.split(PART), ids[0, 1:].split(PART), strict=True)
    each = [(float(torch.nn.functional.cross_entropy(a.float(), b, reduction="sum")), float(len(b))) for a, b in parts]
    samples, weights = zip(*each, strict=True)
    return Metric("nats", sum(samples) / sum(weights), "nats per token", "lower", samples, weights)


def compare(model: Any, ids: torch.Tensor, method: str, rounds: int, plain: Metric | None) -> dict[str, Any]:
    times: dict[str | None, list[float]] = {method: [], None: []}
    computed = 1.0
    for pair in range(-1, rounds):
        for turn in (method, None) if pair % 2 == 0 else (None, method):
            if pair < 0:
                with counting() as counts:
                    seconds(model, ids, turn)
                computed = counts.computed / counts.causal if counts.causal else computed
            else:
                times[turn].append(seconds(model, ids, turn))
    sdpa, ours = (Metric("prefill", statistics.median(times[turn]), "s", "lower", tuple(times[turn])) for turn in (None, method))
    line: dict[str, Any] = {"method": method, "tokens": ids.shape[1], "faster": ratio(sdpa, ours), "sdpa_s": sdpa.samples}
    line |= {"method_s": ours.samples, "computed": computed if method != NOTHING else 0.0}
    if plain is not None and method != NOTHING:
        mine = losses(model, ids, method)
        line |= {"nats": mine.value, "sdpa_nats": plain.value, "loss_ratio": ratio(mine, plain), "parts": mine.samples}
    return line


def shown(line: dict[str, Any]) -> str:
    middle, low, high = line["faster"]
    text = f"{line['model']:9}{line['tokens']:>7}  {line['method']:44} sdpa / method {middle:.3f} [{low:.3f}, {high:.3f}]"
    text += f"  computed {line['computed']:.3f}  {statistics.median(line['sdpa_s']):.2f} s sdpa"
    if "nats" in line:
        middle, low, high = line["loss_ratio"]
        text += f"  {line['nats']:.4f} nats, / sdpa {middle:.4f} [{low:.4f}, {high:.4f}]"
    if line["method"] == NOTHING:
        text += f"  attention's share {max(0.0, 1 - 1 / line['faster'][0]):.2f}"
    return text


def models(asked: argparse.Namespace) -> Iterator[tuple[str, Any, Any]]:
    """(name, model, tokenizer or None) one after another, so that one is held at a time."""
    for name in asked.models:
        if name == "random" and asked.quick:
            yield name, tiny("mistral", context=1 << 20), None
        elif name == "random":
            torch.manual_seed(0)
            config = MistralConfig(
                vocab_size=32_000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
                num_key_value_heads=4, head_dim=64, sliding_window=None, tie_word_embeddings=True, max_position_embeddings=1 << 17,
            )  # fmt: skip
            yield name, MistralForCausalLM(config).eval(), None
        else:
            loaded = load(name, dtype=torch.float32)
            yield name, loaded.model.eval(), loaded.tokenizer


def main(words: Sequence[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--models", nargs="+", default=["random", "embedded"], help="random, embedded, a folder or a hub id")
    ask.add_argument("--tokens", nargs="+", type=int, default=[2048, 8192, 16_384])
    ask.add_argument("--methods", nargs="+", default=[NOTHING, *METHODS], help="as in a recipe, or nothing")
    ask.add_argument("--pairs", type=int, default=7)
    ask.add_argument("--json", type=Path, default=Path("prefill_sparse.json"))
    ask.add_argument("--quick", action="store_true", help="a tiny random model, 256 tokens, 2 pairs")
    asked = ask.parse_args(words)
    if asked.quick:
        asked.tokens, asked.methods, asked.pairs = [256], [NOTHING, *QUICK], 2
    AttentionInterface.register("smelt_benchmark_nothing", free)
    AttentionMaskInterface.register("smelt_benchmark_nothing", sdpa_mask)
    lines = []
    for name, model, tokenizer in models(asked):
        size = sum(p.numel() for p in model.parameters())
        print(f"{name}: {size / 1e6:.1f} M parameters, {torch.get_num_threads()} threads", flush=True)
        for count in asked.tokens:
            if tokenizer is None:
                ids = torch.randint(model.config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
            else:
                ids = torch.tensor([prompt(Variant(name, model, tokenizer), count)])
                if count > model.config.max_position_embeddings:
                    print(f"{name} has {model.config.max_position_embeddings} positions; {count} tokens extrapolate", flush=True)
            plain = None if tokenizer is None else losses(model, ids, None)
            for method in asked.methods:
                lines.append({"model": name} | compare(model, ids, method, asked.pairs, plain))
                print(shown(lines[-1]), flush=True)
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    about |= {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    asked_for = {key: str(value) if isinstance(value, Path) else value for key, value in vars(asked).items()}
    asked.json.write_text(json.dumps({"asked": asked_for, **about, "results": lines}, indent=1, allow_nan=False))
    print(f"all samples in {asked.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
