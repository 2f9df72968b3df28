"""Caches beside transformers' own QuantizedCache and beside kvpress: `python benchmarks/longcontext_vs_peers.py`.

The same checkpoint, the same tokens, float32 unless `--dtype` says otherwise, one process a side. Each peer has an environment of
its own: `--quant-python` (this transformers, optimum-quanto, hqq) and `--kvpress-python` (kvpress 0.5.5 and the transformers it
wants, below 5.3); without them they are made once under --home. A document is a prompt of `--prompt` tokens in one call, then
`--after` tokens of its own text, teacher forced.

    quant      kivi(bits=2), kivi(bits=4)       QuantizedCache, quanto and hqq, the same bits, groups of 32, 128 tokens in full
    kvpress    snapkv                           SnapKVPress, its defaults on both sides: window 64, mean over 5
               expected_attention               ExpectedAttentionPress, its defaults on both sides: 4 sinks, 512 positions
               h2o                              ObservedAttentionPress
               think(drop=0.5)                  ThinKPress(0.5)

    bits per byte   of the tokens after the prompt but the first, which every cache predicts from the prompt in full
    held            bytes of all storages of the cache when the prompt has been read, and, for quantized caches, when
                    all has; tensors inside quanto's and hqq's included
    prefill, step   seconds of the prompt's call; mean over `--steps` calls of one token after it

Ratios are smelt / peer. Quality: over documents. Times: cases of both sides in turns, in an order that shifts from round to
round; medians over rounds. With 95 % bootstrap intervals. Each side also reads with its full cache, which must give the same bits
per byte on both; its times show what the two versions of transformers differ by. A case that a peer cannot run is shown with its error.

Where the protocols differ
- QuantizedCache quantizes a prompt as a whole, the newest tokens too, and from then on all tokens anew, from their rounded values,
  whenever 128 more have come. kivi keeps the last ones in full and never rounds twice. The document is read on `--chunk` tokens at a
  time by both. transformers advises axis 0 for quanto and axis 1 for hqq, both channels of one token; beside it stand keys with
  the other axis (quanto: 32 tokens of a channel, as kivi; hqq: elements that lie far apart). hqq fits its zero points.
- Scales and minima of the peers have the model's precision, kivi's are fp16: with float32 and groups of 32 that is 2 bits per
  element beside the code, and 1. `--dtype bfloat16` makes it 1 for both. Bytes right after the prompt flatter the peers, which hold
  no token in full then; at the end both do.
- kvpress cuts once, after the prompt. So does smelt here: what follows is read in one call (quality), or with a slack as
  long as what is written (times). As set by default smelt cuts again, to bound the memory of long answers; expected_attention
  holds 128 queries for it, here 1 (memory=1); snapkv holds those of its window all the same, which its bytes show.
- snapkv and expected_attention choose by the formula of their press; their bits per byte should be the same. ObservedAttentionPress
  takes the mean over the queries that could see a token, h2o the sum, as its paper does, and half of its budget is the newest tokens.
  The press needs eager attention, all weights at once; h2o computes them a second time, in pieces.
- ThinKPress writes zeros into the channels of all keys of the prompt, which frees nothing. think leaves the newest 32 whole,
  drops the channels for real, and those of tokens written later when they are 32 tokens old.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

BUDGET, WINDOW, HORIZON, GROUP, RESIDUAL = 0.25, 64, 512, 32, 128
QUICK = {"documents": 1, "prompt": 384, "after": 64, "rounds": 1, "steps": 4}
PEERS = {"quant": ("optimum-quanto", "hqq"), "kvpress": ("kvpress==0.5.5",)}
HELD = {"held": "held", "end": "at the end"}
FULL: dict[str, Any] = {}  # the case of a full cache, on any side


class Pair(NamedTuple):
    ours: str  # a method of smelt
    name: str  # of the peer's
    theirs: dict[str, Any]


def pairs(peer: str, prompt: int, after: int) -> list[Pair]:
    if peer == "quant":
        axes = {"quanto": ((0, 0), (-1, 0)), "hqq": ((1, 1), (0, 1))}
        return [
            Pair(
                f"kivi(bits={bits})",
                f"{backend} {bits} bits, axes {key} {value}",
                {
                    "backend": backend, "nbits": bits, "axis_key": key, "axis_value": value,
                    "q_group_size": GROUP, "residual_length": RESIDUAL,
                },
            )
            for bits in (2, 4) for backend, both in axes.items() for key, value in both
        ]  # fmt: skip
    kept = int(BUDGET * prompt)
    drop = {"compression_ratio": 1 - (kept + 0.5) / prompt}  # kvpress keeps int(prompt (1 - ratio))
    return [
        Pair(
            f"snapkv(budget={kept - WINDOW}, window={WINDOW}, kernel=5, pool='mean', slack={after})",
            "SnapKVPress",
            {**drop, "window_size": WINDOW, "kernel_size": 5},
        ),
        Pair(
            f"expected_attention(budget={kept}, sinks=4, horizon={HORIZON}, memory=1, slack={after})",
            "ExpectedAttentionPress",
            {**drop, "n_sink": 4, "n_future_positions": HORIZON},
        ),
        Pair(f"h2o(heavy={kept - kept // 2}, recent={kept // 2}, slack={after})", "ObservedAttentionPress", drop),
        Pair("think(drop=0.5)", "ThinKPress", {"key_channel_compression_ratio": 0.5, "window_size": 32}),
    ]


def main(arguments: list[str] | None = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), help="none: smelt's side alone")
    ask.add_argument("--documents", type=int, default=16)
    ask.add_argument("--prompt", type=int, default=1536, help="tokens")
    ask.add_argument("--after", type=int, default=512, help="tokens after the prompt")
    ask.add_argument("--chunk", type=int, default=32, help="tokens of a call after the prompt; quantized caches only")
    ask.add_argument("--rounds", type=int, default=7)
    ask.add_argument("--steps", type=int, default=RESIDUAL, help="timed calls of one token")
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    ask.add_argument("--quick", action="store_true", help="small, to see that it runs")
    ask.add_argument("--quant-python", type=Path, help="of an environment with this transformers, optimum-quanto and hqq")
    ask.add_argument("--kvpress-python", type=Path, help="of an environment with kvpress")
    ask.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "smelt-longcontext-vs-peers", help="environments and text")
    ask.add_argument("--json", type=Path)
    ask.add_argument("--worker", help=argparse.SUPPRESS)
    asked = ask.parse_args(arguments)
    if asked.worker:
        serve(asked)
        return 0
    for name, value in QUICK.items() if asked.quick else ():
        setattr(asked, name, value)
    if int(BUDGET * asked.prompt) <= WINDOW:
        sys.exit(f"--prompt {asked.prompt} is too short: {BUDGET:.0%} of it must be more than snapkv's window of {WINDOW}")
    if asked.prompt % RESIDUAL or RESIDUAL % asked.chunk:
        sys.exit(f"--prompt must be a multiple of {RESIDUAL} and --chunk a divisor: quanto's groups along tokens must come out even")
    if asked.steps >= asked.after:
        sys.exit(f"--steps {asked.steps} needs --after {asked.steps + 1} or more")
    asked.home.mkdir(parents=True, exist_ok=True)
    prepare(asked)
    found: dict[str, Any] = {}
    for group in asked.peers or PEERS:
        found[group] = compare(group, asked)
    if asked.json is not None:
        said = {name: str(value) if isinstance(value, Path) else value for name, value in vars(asked).items()}
        asked.json.write_text(json.dumps({"asked": said, "results": found}, indent=1))
    return 0


def prepare(asked: argparse.Namespace) -> None:
    """Where the checkpoint is, and the documents as ids with the bytes of each, for all sides."""
    from transformers import AutoTokenizer

    from smelt.data.stdlib import Stdlib
    from smelt.evaluate import Variant
    from smelt.evaluate.position import long
    from smelt.model._load import locate

    folder = locate("embedded")
    variant = Variant("read", None, AutoTokenizer.from_pretrained(folder), data=Stdlib())
    rows = long(variant, asked.documents, asked.prompt + asked.after - 1)  # and the start token
    text = [{"ids": row.ids, "bytes": row.bytes.tolist()} for row in rows]
    (asked.home / "text.json").write_text(json.dumps({"model": str(folder), "rows": text}))


def python(side: str, asked: argparse.Namespace) -> Path:
    """Of the side's environment; a peer's is made once where none is given."""
    given = {"smelt": Path(sys.executable), "quant": asked.quant_python, "kvpress": asked.kvpress_python}[side]
    if given is not None:
        return given
    import torch
    import transformers

    place = asked.home / side
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        pip = [place / "bin" / "python", "-m", "pip", "install", "-q"]
        same = [f"torch=={torch.__version__.split('+')[0]}"]
        subprocess.run([*pip, *same], check=True)
        if side == "quant":
            same.append(f"transformers=={transformers.__version__}")
        subprocess.run([*pip, *same, *PEERS[side]], check=True)
        (place / "ready").touch()
    return place / "bin" / "python"


class Worker:
    """A process of one side that answers requests, a line of JSON each."""

    def __init__(self, side: str, asked: argparse.Namespace) -> None:
        self.side, self.log = side, asked.home / f"{side}.log"
        settings = ["--home", asked.home, "--dtype", asked.dtype, "--threads", str(asked.threads)]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(asked.threads)}
        with self.log.open("w") as log:
            command = [python(side, asked), __file__, "--worker", side, *settings]
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )  # fmt: skip
        self.versions = self.answer()

    def ask(self, **request: Any) -> dict:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.side} ended:\n{self.log.read_text()[-3000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


def compare(group: str, asked: argparse.Namespace) -> dict[str, Any]:
    both = pairs(group, asked.prompt, asked.after)
    sides = ["smelt"] + [group] * (group in asked.peers)
    cases = {("smelt", "full"): FULL, **{("smelt", pair.ours): {"cache": pair.ours} for pair in both}}
    if group in asked.peers:
        cases |= {(group, "full"): FULL, **{(group, pair.name): {"name": pair.name, **pair.theirs} for pair in both}}
    with ExitStack() as stack:
        workers = {}
        for side in sides:
            workers[side] = Worker(side, asked)
            stack.callback(workers[side].close)
        read = {"prompt": asked.prompt, "chunk": asked.chunk if group == "quant" else asked.after}
        found = {key: workers[key[0]].ask(what="quality", case=case, **read) for key, case in cases.items()}
        for key in [key for key, answer in found.items() if "error" in answer]:
            print(f"{key[0]} cannot run {key[1]}: {found[key]['error']}", flush=True)
            if "smelt" in key or "full" in key:
                sys.exit("without it there is nothing to compare")
            del cases[key]
        full = [sum(found[side, "full"]["bits"]) / sum(found[side, "full"]["bytes"]) for side in sides]
        if asked.dtype == "float32" and abs(full[0] / full[-1] - 1) > 1e-4:
            sys.exit(
                f"with full caches smelt's side has {full[0]:.5f} bits per byte and {group} {full[-1]:.5f}: not the same model or text"
            )
        if group == "kvpress":  # smelt's caches have cut again after the one call, kvpress's have not: not the same
            for answer in found.values():
                answer.pop("end", None)
        time_all(workers, cases, found, asked)
        versions = {side: workers[side].versions for side in sides}
    show(group, both, versions, found)
    return {"versions": versions, "cases": [{"side": key[0], "case": key[1], **answer} for key, answer in found.items()]}


def time_all(workers: dict[str, Worker], cases: dict, found: dict, asked: argparse.Namespace) -> None:
    keys = list(cases)
    for key in keys:  # warm
        workers[key[0]].ask(what="time", case=cases[key], prompt=asked.prompt, row=0, steps=2)
        found[key] |= {"prefill": [], "step": []}
    for round_ in range(asked.rounds):
        for turn in range(len(keys)):
            key = keys[(round_ + turn) % len(keys)]
            taken = workers[key[0]].ask(what="time", case=cases[key], prompt=asked.prompt, row=round_, steps=asked.steps)
            if "error" in taken:
                sys.exit(f"{key[0]} cannot run {key[1]}: {taken['error']}")
            for what in ("prefill", "step"):
                found[key][what].append(taken[what])


def show(group: str, both: list[Pair], versions: dict, found: dict) -> None:
    import statistics

    from smelt.evaluate import Metric
    from smelt.evaluate._measure import ratio

    def bits(answer: dict) -> Metric:
        return Metric("bits", 0.0, "bits", "lower", tuple(answer["bits"]), tuple(answer["bytes"]))

    def told(values: tuple[float, float, float], digits: int = 3) -> str:
        return "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(*values, d=digits)

    for side, version in versions.items():
        print(f"{group}: {side} with " + ", ".join(f"{name} {value}" for name, value in version.items()))
    for (side, name), a in found.items():
        if "error" in a:
            continue
        full = found[side, "full"]
        loss = 100 * (ratio(bits(a), bits(full))[0] - 1)
        held = ", ".join(f"{when} {a[what] / 1e6:.3f} MB ({a[what] / full[what]:.3f} of full)" for what, when in HELD.items() if what in a)
        spent = ", ".join(f"{what} {1e3 * statistics.median(a[what]):.4g} ms" for what in ("prefill", "step"))
        print(f"  {side:8}{name}: {sum(a['bits']) / sum(a['bytes']):.4f} bits per byte ({loss:+.2f} %), {held}, {spent}")
    for ours, name, _ in [Pair("full", "full", FULL), *both]:
        a, b = found["smelt", ours], found.get((group, name))
        if b is None or "error" in b:
            continue
        spans = {what: ratio(*(Metric(what, 0.0, "s", "lower", tuple(side[what])) for side in (a, b))) for what in ("prefill", "step")}
        held = ", ".join(f"{when} {a[what] / b[what]:.3f}" for what, when in HELD.items() if what in a)
        spent = ", ".join(f"{what} {told(span)}" for what, span in spans.items())
        short = ours.split("(budget")[0].split("(heavy")[0]
        print(f"{short} / {name}: bits per byte {told(ratio(bits(a), bits(b)), 4)}, {held}, {spent}")
    print(flush=True)


# what runs in the environment of a side; nothing above it may import smelt at the top


def serve(asked: argparse.Namespace) -> None:
    """Answers a line of JSON with a line of JSON until its input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import torch
    import transformers

    torch.set_num_threads(asked.threads)
    transformers.utils.logging.disable_progress_bar()
    text = json.loads((asked.home / "text.json").read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(text["model"], dtype=getattr(torch, asked.dtype)).eval()
    side = SIDES[asked.worker](model)

    def say(answer: dict) -> None:
        out.write(json.dumps(answer) + "\n")
        out.flush()

    say({"torch": torch.__version__, "transformers": transformers.__version__, **side.versions()})
    for line in sys.stdin:
        request = json.loads(line)
        work = quality if request.pop("what") == "quality" else timed
        try:
            with torch.no_grad():
                say(work(side, text["rows"], **request))
        except Exception as error:
            say({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"})


def quality(side: Side, rows: list[dict], case: dict, prompt: int, chunk: int) -> dict:
    """Bits and bytes of each document behind the prompt and its first token, and the bytes held after the prompt and at the end."""
    import torch

    bits, sizes, held, end = [], [], 0, 0
    for row in rows:
        ids = torch.tensor([row["ids"]])
        last = ids.shape[1] - 1  # the last id is only predicted
        with side.bound(case):
            cache, start, total = side.read(case, ids[:, :prompt]), prompt, 0.0
            held = side.held(cache)
            while start < last:
                stop = min(start + chunk, last)
                scores = side.call(ids[:, start:stop], cache, start).logits[0].float().log_softmax(-1)
                total -= float(scores.gather(1, ids[0, start + 1 : stop + 1, None]).double().sum())
                start = stop
            end = side.held(cache)
        bits.append(total / math.log(2))
        sizes.append(sum(row["bytes"][prompt + 1 :]))
    return {"bits": bits, "bytes": sizes, "held": held, "end": end}


def timed(side: Side, rows: list[dict], case: dict, prompt: int, row: int, steps: int) -> dict:
    import torch

    ids = torch.tensor([rows[row % len(rows)]["ids"]])
    with side.bound(case):
        began = time.perf_counter()
        cache = side.read(case, ids[:, :prompt])
        between = time.perf_counter()
        for at in range(prompt, prompt + steps):
            side.call(ids[:, at : at + 1], cache, at)
        return {"prefill": between - began, "step": (time.perf_counter() - between) / steps}


class Side:
    """A model and how a case reads a prompt; here a full cache."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def versions(self) -> dict[str, str]:
        return {}

    @contextmanager
    def bound(self, case: dict) -> Iterator[None]:
        yield

    def fresh(self, case: dict) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def read(self, case: dict, ids: Any) -> Any:
        cache = self.fresh(case)
        self.call(ids, cache, 0, logits_to_keep=1)
        return cache

    def call(self, ids: Any, cache: Any, start: int, **more: Any) -> Any:
        import torch

        positions = torch.arange(start, start + ids.shape[1])[None]  # kvpress's caches count the tokens they kept
        return self.model(input_ids=ids, past_key_values=cache, position_ids=positions, use_cache=True, **more)

    def held(self, cache: Any) -> int:
        return storages(list(cache.layers))


class Smelt(Side):
    @contextmanager
    def bound(self, case: dict) -> Iterator[None]:
        from smelt.runtime import bind

        with bind(self.model, **case):
            yield

    def fresh(self, case: dict) -> Any:
        from smelt.runtime import new_cache

        return new_cache(self.model, case["cache"]) if case else super().fresh(case)

    def held(self, cache: Any) -> int:
        from smelt.runtime import cache_bytes

        return cache_bytes(cache)


class Quantized(Side):
    def versions(self) -> dict[str, str]:
        return packages("optimum-quanto", "hqq")

    def fresh(self, case: dict) -> Any:
        from transformers import QuantizedCache

        if not case:
            return super().fresh(case)
        return QuantizedCache(config=self.model.config, **{name: value for name, value in case.items() if name != "name"})


class Pressed(Side):
    def versions(self) -> dict[str, str]:
        return packages("kvpress")

    @contextmanager
    def bound(self, case: dict) -> Iterator[None]:
        before = self.model.config._attn_implementation
        self.model.set_attn_implementation("eager" if case.get("name") == "ObservedAttentionPress" else before)
        try:
            yield
        finally:
            self.model.set_attn_implementation(before)

    def read(self, case: dict, ids: Any) -> Any:
        if not case:
            return super().read(case, ids)
        import kvpress

        press = getattr(kvpress, case["name"])(**{name: value for name, value in case.items() if name != "name"})
        with press(self.model):
            return super().read(case, ids)


SIDES = {"smelt": Smelt, "quant": Quantized, "kvpress": Pressed}


def packages(*names: str) -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in names}


def storages(value: Any) -> int:
    """Bytes of every storage reachable from `value`, once. A tensor that wraps others has none of its own."""
    import torch
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    found: dict[int, int] = {}
    known: dict[int, Any] = {}  # held, so that no number comes twice

    def visit(value: Any) -> None:
        if id(value) in known or isinstance(value, (torch.nn.Module, type, str, bytes)):
            return
        known[id(value)] = value
        if isinstance(value, torch.Tensor):
            if is_traceable_wrapper_subclass(value):
                for name in value.__tensor_flatten__()[0]:
                    visit(getattr(value, name))
            else:
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            return
        if isinstance(value, (dict, list, tuple)):
            parts = value.values() if isinstance(value, dict) else value
        else:
            parts = getattr(value, "__dict__", {}).values()
        for part in parts:
            visit(part)

    visit(value)
    return sum(found.values())


if __name__ == "__main__":
    sys.exit(main())
