"""Pruning and quantizing beside llm-compressor, merging beside mergekit: `python benchmarks/weights_vs_peers.py`.

Each peer gets an environment of its own (made once under --home); smelt runs in this one. The same checkpoint, the same
calibration rows (64 of 256 tokens), the same settings, fresh processes in turns (A B, B A, ...):

    gptq        4 bits, groups of 128, asymmetric, damp 0.01, no reordering    GPTQModifier
    gptq3       the same at 3 bits
    wanda       50 %, per row                                                  WandaPruningModifier
    sparsegpt   50 %, blocks of 128, damp 0.01                                 SparseGPTModifier
    linear, slerp, ties    two models and their base                           mergekit-yaml

Quality is the embedded model's bits per byte after each (smelt's probe reads both results), time and peak memory are
those of a random Mistral model of --layers layers (default 114M parameters), from the loaded model (merging: from the
start of the process) to the written checkpoint, memory above that before. Printed as smelt / peer, medians with the
smallest and largest of the pairs. Of merged
models the share of weights that differ is printed instead of quality (ties: where changes cancel, rounding elects).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import venv
from pathlib import Path

ROWS, CONTEXT = 64, 256
PEERS = {"llmcompressor": "llmcompressor", "mergekit": "mergekit"}
CALIBRATED = {
    "gptq": "gptq(grid=rtn(bits=4, group=128))",
    "gptq3": "gptq(grid=rtn(bits=3, group=128))",
    "wanda": "wanda(sparsity=0.5)",
    "sparsegpt": "sparsegpt(sparsity=0.5)",
}
MERGED = {
    "linear": "linear(models=['{home}/b'])",
    "slerp": "slerp(models=['{home}/b'])",
    "ties": "ties(models=['{home}/b'], base='{home}/embedded', density=0.5)",
}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--pairs", type=int, default=3)
    ask.add_argument("--layers", type=int, default=8)
    ask.add_argument("--cases", nargs="+", default=[*CALIBRATED, *MERGED], choices=[*CALIBRATED, *MERGED])
    ask.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "smelt-weights-vs-peers", help="environments and models")
    ask.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.worker:
        who, case, which = asked.worker
        print(json.dumps(WORKERS[who](case, which, asked.home)))
        return
    home = asked.home
    home.mkdir(parents=True, exist_ok=True)
    if not (home / f"ready{asked.layers}").exists():
        prepare(home, asked.layers)
    for case in asked.cases:
        compare(case, home, asked.pairs)


def python(who: str, home: Path) -> Path:
    """Of the peer's own environment; made once."""
    if who == "smelt":
        return Path(sys.executable)
    place = home / who
    if not (place / "ready").exists():
        venv.create(place, with_pip=True, clear=True)
        pip = [place / "bin" / "python", "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, PEERS[who]], check=True)
        (place / "ready").touch()
    return place / "bin" / "python"


def prepare(home: Path, layers: int) -> None:
    """The models, two neighbours of the embedded one to merge, and the rows, once."""
    import torch

    from smelt.compress import calibration_rows
    from smelt.data._tokens import tokenize
    from smelt.data.stdlib import Stdlib
    from smelt.model._load import load, save
    from smelt.model.mistral import Mistral

    loaded = load("embedded")
    rows = calibration_rows(tokenize(Stdlib(), "train", loaded.tokenizer, home / "tokens"), ROWS, CONTEXT, 8, 0)
    (home / "rows.json").write_text(json.dumps([row.tolist() for batch in rows for row in batch["input_ids"]]))
    big = Mistral(layers=layers, hidden=1024, ffn=2816, heads=16, kv_heads=8, vocab=4096, data=Stdlib()).config()
    torch.manual_seed(0)
    from transformers import MistralForCausalLM

    for name, model in (("embedded", loaded.model), ("large", MistralForCausalLM(big))):
        save(model, loaded.tokenizer, home / name)
        for noise, neighbour in ((1, "a"), (2, "b")):
            torch.manual_seed(noise)
            with torch.no_grad():
                moved = {k: v + 0.05 * v.std() * torch.randn_like(v) if v.dim() > 1 else v for k, v in model.state_dict().items()}
                other = type(model)(model.config)
                other.load_state_dict(moved)
            save(other, loaded.tokenizer, home / (neighbour if name == "embedded" else f"large-{neighbour}"))
    (home / f"ready{layers}").touch()


def compare(case: str, home: Path, pairs: int) -> None:
    peer = "llmcompressor" if case in CALIBRATED else "mergekit"
    quality = {who: work(who, case, "embedded", home)["quality"] for who in ("smelt", peer)}
    if case in CALIBRATED:
        ours, theirs = (work("read", quality[who], "-", home)["bits_per_byte"] for who in ("smelt", peer))
        print(f"{case}: bits per byte smelt {ours:.4f}, {peer} {theirs:.4f}: ratio {ours / theirs:.4f}", flush=True)
    else:
        seen = work("differ", quality["smelt"], quality[peer], home)
        print(f"{case}: {seen['share']:.2e} of the merged weights differ by more than 1e-6, at most by {seen['off']:.2e}", flush=True)
    found: dict[str, list[dict]] = {"smelt": [], peer: []}
    for pair in range(pairs):
        for who in ("smelt", peer) if pair % 2 == 0 else (peer, "smelt"):
            found[who].append(work(who, case, "large", home))
    for what in ("seconds", "peak"):
        ratios = sorted(a[what] / b[what] for a, b in zip(found["smelt"], found[peer], strict=True))
        middle = [statistics.median(row[what] for row in found[who]) for who in ("smelt", peer)]
        shown = (
            f"{middle[0]:.1f} and {middle[1]:.1f} s" if what == "seconds" else f"{middle[0] / 2**20:,.0f} and {middle[1] / 2**20:,.0f} MB"
        )
        print(f"{case}: {what}, smelt / {peer}: {statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}] ({shown})", flush=True)


def work(who: str, case: str, which: str, home: Path) -> dict:
    command = [python(who if who in PEERS else "smelt", home), __file__, "--worker", who, case, which, "--home", home]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{who} failed in {case}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Watched:
    """Seconds, and peak resident bytes above those at the start (sampled every 5 ms), of a block."""

    def __enter__(self):
        self.start, self.most, self.running, self.began = resident(), 0, True, time.perf_counter()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.005)

    def __exit__(self, *error):
        self.seconds, self.running = time.perf_counter() - self.began, False
        self.thread.join()

    def told(self, folder: Path) -> dict:
        return {"seconds": self.seconds, "peak": self.most - self.start, "quality": str(folder)}


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def smelt_worker(case: str, which: str, home: Path) -> dict:
    out = Path(tempfile.mkdtemp(dir=home))
    if case in MERGED:
        with Watched() as seen:
            from smelt import registry
            from smelt.weights._merge import merge_folders

            names = ("a", "b", "embedded") if which == "embedded" else ("large-a", "large-b", "large")
            method = registry.parse(MERGED[case].format(home=home), "weights")
            merge_folders(method, [home / names[0], home / names[1]], home / names[2] if method.needs_base else None, out / "result")
        return seen.told(out / "result")
    import torch

    from smelt import registry
    from smelt.compress import compress, save_compressed
    from smelt.model._load import load

    loaded = load(str(home / which))
    ids = torch.tensor(json.loads((home / "rows.json").read_text()))
    rows = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)]
    with Watched() as seen:
        model, report = compress(loaded.model, loaded.tokenizer, registry.parse(CALIBRATED[case], "weights"), rows, progress=None)
        save_compressed(model, loaded.tokenizer, out / "result", report)
    return seen.told(out / "result")


def llmcompressor_worker(case: str, which: str, home: Path) -> dict:
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.obcq import SparseGPTModifier
    from llmcompressor.modifiers.pruning import WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = Path(tempfile.mkdtemp(dir=home)) / "result"
    model = AutoModelForCausalLM.from_pretrained(home / which, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / which)
    rows = json.loads((home / "rows.json").read_text())
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * CONTEXT] * len(rows)})
    bits = {"num_bits": 3 if case == "gptq3" else 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 128}
    pruned = {"sparsity": 0.5, "targets": ["Linear"], "ignore": ["re:.*lm_head"]}
    recipes = {
        "wanda": lambda: WandaPruningModifier(**pruned),
        "sparsegpt": lambda: SparseGPTModifier(block_size=128, dampening_frac=0.01, **pruned),
    }
    quantizing = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": bits}}, "ignore": ["lm_head"]}
    recipe = recipes.get(case, lambda: GPTQModifier(dampening_frac=0.01, actorder=None, **quantizing))()
    with Watched() as seen:
        oneshot(
            model=model,
            processor=tokenizer,
            dataset=data,
            recipe=recipe,
            max_seq_length=CONTEXT,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(out, save_compressed=False)
    tokenizer.save_pretrained(out)
    return seen.told(out)


def mergekit_worker(case: str, which: str, home: Path) -> dict:
    out = Path(tempfile.mkdtemp(dir=home))
    names = ("a", "b", "embedded") if which == "embedded" else ("large-a", "large-b", "large")
    a, b, base = (str(home / name) for name in names)
    if case == "slerp":
        config = {"merge_method": "slerp", "base_model": a, "models": [{"model": a}, {"model": b}], "parameters": {"t": 0.5}}
    elif case == "linear":
        config = {"merge_method": "linear", "models": [{"model": m, "parameters": {"weight": 0.5}} for m in (a, b)]}
    else:
        listed = [{"model": m, "parameters": {"weight": 1.0, "density": 0.5}} for m in (a, b)]
        config = {"merge_method": "ties", "base_model": base, "models": listed, "parameters": {"normalize": True}}
    config["dtype"] = "float32"
    (out / "merge.yaml").write_text(json.dumps(config))  # JSON is YAML
    with Watched() as seen:
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        run_merge(MergeConfiguration.model_validate(config), str(out / "result"), MergeOptions(cuda=False, copy_tokenizer=True))
    return seen.told(out / "result")


def read(folder: str, _: str, home: Path) -> dict:
    """Bits per byte of a result, by smelt's probe."""
    from smelt.data.stdlib import Stdlib
    from smelt.evaluate import Variant
    from smelt.evaluate.perplexity import Perplexity
    from smelt.model._load import load

    loaded = load(folder)
    found = Perplexity()(Variant("read", loaded.model, loaded.tokenizer, teacher=None, data=Stdlib()))
    return {"bits_per_byte": next(m.value for m in found if m.name == "bits_per_byte")}


def differ(one: str, other: str, home: Path) -> dict:
    from smelt.model._load import load

    a, b = (load(folder).model.state_dict() for folder in (one, other))
    off = {k: (a[k] - b[k]).abs() for k in a}
    apart = sum(int((v > 1e-6).sum()) for v in off.values())
    return {"off": max(float(v.max()) for v in off.values()), "share": apart / sum(v.numel() for v in off.values())}


WORKERS = {"smelt": smelt_worker, "llmcompressor": llmcompressor_worker, "mergekit": mergekit_worker, "read": read, "differ": differ}

if __name__ == "__main__":
    main()
