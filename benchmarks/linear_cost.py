"""What a token costs by the length of the text before it: linear mixers beside softmax, `python benchmarks/linear_cost.py`.

    python benchmarks/linear_cost.py                                   # 1k to 64k tokens, about ten minutes on two cores
    python benchmarks/linear_cost.py --quick                           # seconds; shows that it runs, not what a token costs
    python benchmarks/linear_cost.py --methods based lightning --lengths 4096 16384
    python benchmarks/linear_cost.py --piece 1024                      # the prompt 1,024 tokens at a time, which bounds the activations

A random Mistral-shaped model for each method (cost does not depend on the weights), one row. Timed are one call that reads the
whole text (prefill, seconds / tokens) and then single tokens through the state it left (decode, the median of them). All methods and
lengths in turns, in another order each round. Printed: microseconds of a token, the ratio to the shortest length, paired by
round, with its 95 % bootstrap interval (1 is flat), and the bytes of the state. Softmax is read up to `--dense` tokens
only, as its prefill grows with the square. The first round warms up and is not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from smelt import registry
from smelt.attention._mixer import convert, place
from smelt.evaluate import Metric
from smelt.evaluate._measure import ratio
from smelt.runtime import cache_bytes

SOFTMAX = "softmax"


def made(method: str, layers: int, hidden: int, context: int) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=hidden * 5 // 2,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        head_dim=64,
        max_position_embeddings=context,
        sliding_window=None,
    )
    torch.manual_seed(0)
    model = MistralForCausalLM(config)
    if method != SOFTMAX:
        place(model, convert(model, registry.parse(method, "attention")))
    return model.eval()


@torch.no_grad()
def timed(model: MistralForCausalLM, length: int, steps: int, piece: int) -> tuple[float, float, int]:
    """(seconds of a token in prefill, in decode, bytes held)."""
    ids, cache = torch.randint(2, 4096, (1, length)), DynamicCache()
    began = time.perf_counter()
    for part in ids.split(piece or length, 1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    prefill = (time.perf_counter() - began) / length
    each = []
    for _ in range(steps):
        began = time.perf_counter()
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        each.append(time.perf_counter() - began)
    return prefill, statistics.median(each), cache_bytes(cache)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["based", "lightning", "jrt", SOFTMAX], help="recipe text, or softmax")
    parser.add_argument("--lengths", nargs="+", type=int, default=[1024, 4096, 16384, 65536])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256, help="a multiple of 128")
    parser.add_argument("--steps", type=int, default=32, help="single tokens after the text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--piece", type=int, default=0, help="tokens of a call of the prefill; 0: the whole text in one")
    parser.add_argument("--dense", type=int, default=8192, help="longest text for softmax")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    if args.quick:
        args.lengths, args.layers, args.hidden, args.steps, args.rounds = [64, 256], 1, 128, 4, 2
    lengths = sorted(args.lengths)
    models = {method: made(method, args.layers, args.hidden, lengths[-1] + args.steps) for method in args.methods}
    cases = [(method, length) for method in models for length in lengths if method != SOFTMAX or length <= args.dense]
    seen: dict[tuple[str, int], list[tuple[float, float, int]]] = {case: [] for case in cases}
    order = random.Random(0)
    for turn in range(args.rounds + 1):
        for method, length in order.sample(cases, len(cases)):
            figures = timed(models[method], length, args.steps, args.piece)
            if turn:
                seen[method, length].append(figures)
    print(f"{args.layers} layers, hidden {args.hidden}, {args.rounds} rounds, {torch.get_num_threads()} threads")
    print(f"{'method':24} {'tokens':>7} {'prefill us':>11} {'ratio':>20} {'decode us':>10} {'ratio':>20} {'state bytes':>12}")
    for method, length in cases:
        line = f"{method:24} {length:7}"
        for place_of in (0, 1):
            now, first = (
                Metric("seconds", statistics.median(row), "s", "lower", row)
                for row in (tuple(r[place_of] for r in seen[method, at]) for at in (length, lengths[0]))
            )
            middle, low, high = ratio(now, first)
            shown = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            line += f" {now.value * 1e6:{11 - place_of}.1f} {shown:>20}"
        print(f"{line} {seen[method, length][0][2]:12}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
