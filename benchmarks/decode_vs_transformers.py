"""Lossless decoding against transformers' own: `python benchmarks/decode_vs_transformers.py [--draft FOLDER]`, about an hour.

Greedy, fp32, on held-out code: `--prompts` windows of `--length` tokens of the test split of `stdlib`, at most `--new` tokens
after each (fewer where the model ends its text). Beside plain `generate`: transformers' prompt lookup (10 tokens), with
`--draft` its assisted generation with that model, and smelt's lossless methods (`--methods` takes any by their text).
For each prompt all of them run in turns in one process, in an order that shifts from prompt to prompt.

    identical     outputs equal to plain greedy token for token, at batch 1 and in batches of 4 (transformers' own take one
                  row); the run fails unless all are for every method of smelt
    tokens/call   new tokens / calls of the target, the one that reads the prompt included
    faster        seconds of plain / seconds of the method, median over prompts with its 95 % bootstrap interval
    draft ms      host time in the drafter for each call of the target (not known for transformers' own)

At 7B, a prediction and no measurement, for 2-byte weights on a device of `--bandwidth` bytes/s and `--balance` FLOP/byte:

    speedup = t / (d + max(1, m / balance)),   d = c where the draft is a model, else h * bandwidth / 14e9

t, the tokens of a call after the prompt's, and m, its positions (gamma + 1 for a chain), are those measured here. A plain step
and a call over m positions both read all weights once; m 2P FLOPs take longer only beyond the balance. c = weights
that the draft reads / weights that the target reads, per call, that is gamma times the ratio of sizes of this very pair;
h = the drafter's host time (0 for transformers' own lookup, which is not timed apart). Left out: attention, embeddings,
launch times, the acceptance of another model's text.

Ends with the table and a JSON file of all samples (`--json`).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from smelt import registry
from smelt.data.stdlib import Stdlib
from smelt.decode._count import count
from smelt.decode._verify import Drafter, Drafting, verified
from smelt.evaluate import Metric
from smelt.evaluate._measure import ratio
from smelt.model._load import load
from smelt.progress import Track, track

METHODS = (
    "prompt_lookup",
    "aded(form='chain')",
    "aded",
    "aded(data=stdlib(), form='chain')",
    "aded(data=stdlib())",
    "aded(data=stdlib(), depth=8, simulations=50, limit=10_000_000)",
)
BATCH = 4
SEVEN = 14e9  # bytes of the weights of a model of 7B parameters
ACCOUNTED = 8  # prompts on which the weights read by drafts are counted, apart from the timed runs


class Timed(Drafter):
    """A drafter and the seconds spent in it."""

    def __init__(self, inner: Drafter):
        self.inner, self.seconds = inner, 0.0
        self.reads = inner.reads  # type: ignore[misc]

    def begin(self, *given: Any) -> None:
        self.clocked(self.inner.begin, *given)

    def draft(self, *given: Any) -> Any:
        return self.clocked(self.inner.draft, *given)

    def kept(self, *given: Any) -> None:
        self.clocked(self.inner.kept, *given)

    def clocked(self, call: Any, *given: Any) -> Any:
        began = time.perf_counter()
        try:
            return call(*given)
        finally:
            self.seconds += time.perf_counter() - began


class Way:
    """One way to generate, and what was measured of it."""

    def __init__(self, name: str, arguments: dict[str, Any], ours: bool, drafter: Timed | None = None):
        self.name, self.arguments, self.ours, self.drafter = name, arguments, ours, drafter
        self.seconds: list[float] = []
        self.batch_seconds: list[float] = []
        self.new: list[int] = []
        self.calls: list[int] = []
        self.positions: list[int] = []
        self.same = self.same_in_batches = 0
        self.draft_seconds = self.draft_weights = 0.0

    @property
    def batches(self) -> bool:
        return self.ours or not self.arguments  # transformers' own drafts are for one row


def ways(model: Any, tokenizer: Any, methods: list[str], draft: str | None) -> list[Way]:
    """Plain greedy first, then transformers' own, then smelt's."""
    found = [Way("plain", {}, False), Way("transformers: prompt lookup", {"prompt_lookup_num_tokens": 10}, False)]
    if draft is not None:
        found.append(Way("transformers: assisted", {"assistant_model": load(draft, dtype=model.dtype).model}, False))
        methods = [*methods, f"speculative(draft={draft!r})", f"speculative(draft={draft!r}, schedule='heuristic')"]
    for text in methods:
        method = registry.parse(text, "decode")
        if not getattr(method, "lossless", False):
            sys.exit(f"{text} is not lossless, so its output may differ from plain greedy; this benchmark compares equal outputs")
        if isinstance(method, Drafting):
            drafter = Timed(method.drafter(model, tokenizer))
            found.append(Way(text, {"custom_generate": verified(drafter)}, True, drafter))
        else:
            found.append(Way(text, method.arguments(model, tokenizer), True))
    return found


def windows(tokenizer: Any, prompts: int, length: int) -> list[list[int]]:
    """Windows of the test split that do not overlap, a random choice that depends on nothing but the numbers."""
    found: list[list[int]] = []
    for document in Stdlib().documents("test"):
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        found += [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if len(found) < prompts:
        sys.exit(f"the test split has {len(found)} windows of {length} tokens; ask for fewer --prompts")
    return random.Random(0).sample(found, prompts)


def generate(model: Any, rows: list[list[int]], new: int, way: Way) -> tuple[list[list[int]], float]:
    """(what was written after each prompt, seconds)."""
    ids = torch.tensor(rows, device=model.device)
    began = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=1, **way.arguments)
    return out[:, ids.shape[1] :].tolist(), time.perf_counter() - began


@contextmanager
def weights_read(model: Any) -> Iterator[list[int]]:
    """[sum of the weights of linear layers that ran, model's own left out], once for each of their calls."""
    own, total = {id(module) for module in model.modules()}, [0]

    def before(module: Any, _: Any) -> None:
        if isinstance(module, nn.Linear) and id(module) not in own:
            total[0] += module.weight.numel()

    handle = nn.modules.module.register_module_forward_pre_hook(before)
    try:
        yield total
    finally:
        handle.remove()


def measure(model: Any, prompts: list[list[int]], new: int, found: list[Way], shown: Track) -> None:
    plain = found[0]
    answers: list[list[int]] = []
    for way in found:  # warm
        generate(model, prompts[:1], min(new, 8), way)
    for at, prompt in enumerate(prompts):
        said = {}
        for turn in range(len(found)):
            way = found[(at + turn) % len(found)]
            shown.advance(0, way.name)
            before = way.drafter.seconds if way.drafter else 0.0
            with count(model) as seen:
                (said[way.name],), seconds = generate(model, [prompt], new, way)
            way.seconds.append(seconds)
            way.new.append(len(said[way.name]))
            way.calls.append(seen.calls)
            way.positions.append(seen.positions - len(prompt))
            way.draft_seconds += way.drafter.seconds - before if way.drafter else 0.0
            shown.advance(1)
        answers.append(said["plain"])
        for way in found:
            way.same += said[way.name] == said["plain"]
    for at in range(0, len(prompts) - BATCH + 1, BATCH):
        several = [way for way in found if way.batches]
        for turn in range(len(several)):
            way = several[(at // BATCH + turn) % len(several)]
            rows, seconds = generate(model, prompts[at : at + BATCH], new, way)
            way.batch_seconds.append(seconds)
            for row, answer in zip(rows, answers[at : at + BATCH], strict=True):
                way.same_in_batches += row == answer + [1] * (len(row) - len(answer))
            shown.advance(1)
    for way in found:
        if way is plain:
            continue
        with weights_read(model) as total, count(model) as seen:
            for prompt in prompts[:ACCOUNTED]:
                generate(model, [prompt], new, way)
        way.draft_weights = total[0] / seen.calls


def summary(way: Way, plain: Way, target: int, asked: argparse.Namespace) -> dict[str, Any]:
    """`target`: weights that a call of the target reads."""
    calls, new, texts = sum(way.calls), sum(way.new), len(way.calls)
    later = max(1, calls - texts)  # calls after the prompt's; the prompt's own also gives a token
    tokens, positions = (new - texts) / later, sum(way.positions) / later
    c = way.draft_weights / target
    host = way.draft_seconds / calls
    cost = c if c else host * asked.bandwidth / SEVEN
    faster = [ratio(Metric("s", 0.0, "s", "lower", tuple(plain.seconds)), Metric("s", 0.0, "s", "lower", tuple(way.seconds)))]
    if way.batch_seconds:
        pair = (Metric("s", 0.0, "s", "lower", tuple(w.batch_seconds)) for w in (plain, way))
        faster.append(ratio(*pair))
    return {
        "name": way.name,
        "identical": way.same,
        "identical_in_batches": way.same_in_batches if way.batches else None,
        "tokens_per_call": new / calls,
        "tokens_per_later_call": tokens,
        "positions_per_later_call": positions,
        "faster": faster[0],
        "faster_in_batches": faster[1] if len(faster) > 1 else None,
        "draft_ms_per_call": 1e3 * host if way.drafter else None,
        "draft_cost_ratio": c,
        "at_7b": tokens / (cost + max(1.0, positions / asked.balance)),
        "seconds": way.seconds,
        "batch_seconds": way.batch_seconds,
        "new_tokens": way.new,
        "calls": way.calls,
    }


def table(lines: list[dict[str, Any]], prompts: int, batched: int) -> str:
    def interval(found: tuple[float, float, float] | None) -> str:
        return "-" if found is None else f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"

    heads = ("method", "identical", "batch 4", "tokens/call", "positions", "faster", "batch 4", "draft ms", "at 7B")
    rows = [heads]
    for line in lines:
        inside, draft = line["identical_in_batches"], line["draft_ms_per_call"]
        rows.append(
            (
                line["name"],
                f"{line['identical']}/{prompts}",
                "-" if inside is None else f"{inside}/{batched}",
                f"{line['tokens_per_call']:.2f}",
                f"{line['positions_per_later_call']:.1f}",
                interval(line["faster"]),
                interval(line["faster_in_batches"]),
                "-" if draft is None else f"{draft:.2f}",
                f"{line['at_7b']:.2f}",
            )
        )
    wide = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, wide))) for row in rows)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--model", default="embedded")
    ask.add_argument("--prompts", type=int, default=200)
    ask.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    ask.add_argument("--new", type=int, default=64, help="tokens after it")
    ask.add_argument("--draft", help="a folder, a hub id or 'embedded': a draft model with the tokenizer of the model")
    ask.add_argument("--methods", nargs="+", default=list(METHODS), help="lossless methods, as in a recipe")
    ask.add_argument("--bandwidth", type=float, default=2.0e12, help="bytes/s of the device at 7B (default: an A100's)")
    ask.add_argument("--balance", type=float, default=150.0, help="FLOP per byte at which that device stops being memory-bound")
    ask.add_argument("--json", type=Path, default=Path("decode_vs_transformers.json"))
    asked = ask.parse_args()

    loaded = load(asked.model, dtype=torch.float32)
    model = loaded.model.eval()
    prompts = windows(loaded.tokenizer, asked.prompts, asked.length)
    found = ways(model, loaded.tokenizer, asked.methods, asked.draft)
    batched = len(prompts) // BATCH * BATCH
    several = sum(way.batches for way in found)
    with track("decode", len(prompts) * len(found) + batched // BATCH * several, "texts") as shown:
        measure(model, prompts, asked.new, found, shown)

    target = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    lines = [summary(way, found[0], target, asked) for way in found]
    machine = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    asked_for = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
    asked.json.write_text(json.dumps({"asked": asked_for, **machine, **versions, "results": lines}, indent=1))
    print(table(lines, len(prompts), batched))
    print(f"{machine['machine']}, {machine['threads']} of {machine['cores']} cores; all samples in {asked.json}")
    wrong = [way.name for way in found if way.ours and (way.same < len(prompts) or way.same_in_batches < batched)]
    if wrong:
        print(f"not identical to plain greedy: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
