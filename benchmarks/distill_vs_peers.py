"""The same distillation in smelt and in TRL: `python benchmarks/distill_vs_peers.py`, about fifteen minutes.

The benchmark makes an environment of its own (TRL and this checkout side by side, the same torch and transformers) and
runs pairs of fresh processes in turns (A B, B A, ...). Each trains the same pruned student of the embedded model from the
same weights on the same rows with AdamW at a constant rate, no compiler, full precision:

    offline     forward KL on given text: TRL's GKDTrainer with lmbda=0, beta=0, temperature=1 against forward_kl()
    jsd         the same with beta=0.5 against generalized_jsd(beta=0.5)
    on-policy   every row a sample of the student: GKDTrainer with lmbda=1 against gkd(share=1.0), 64 + 64 tokens

Printed for each: tokens per second (trained positions, from the first row taken to the end) as smelt / TRL, and the peak
memory of the process above what it held before training, as smelt / TRL, medians with the smallest and largest of the
pairs; and both final losses, which must agree to four digits where nothing is sampled, or the run fails.
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

ROOT = Path(__file__).resolve().parents[1]
TRL = "trl==1.16.0"
CASES = ("offline", "jsd", "on-policy")
BATCH, CONTEXT, PROMPT, LR = 16, 256, 64, 1e-3


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--pairs", type=int, default=5)
    ask.add_argument("--steps", type=int, default=12)
    ask.add_argument("--cases", nargs="+", default=CASES, choices=CASES)
    ask.add_argument("--home", type=Path, default=Path(tempfile.gettempdir()) / "smelt-vs-peers", help="environment and models")
    ask.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    asked = ask.parse_args()
    if asked.worker:
        print(json.dumps(WORKERS[asked.worker[0]](asked.worker[1], asked.steps, asked.home)))
        return
    python = environment(asked.home)
    if not (asked.home / "student").exists():
        subprocess.run([python, __file__, "--worker", "prepare", "-", "--home", asked.home], check=True, stdout=subprocess.DEVNULL)
    for case in asked.cases:
        compare(case, python, asked)


def environment(home: Path) -> Path:
    """A virtual environment with TRL and this checkout; made once."""
    python = home / "venv" / "bin" / "python"
    if not (home / "ready").exists():
        venv.create(home / "venv", with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, TRL, ROOT], check=True)
        (home / "ready").touch()
    return python


def compare(case: str, python: Path, asked: argparse.Namespace) -> None:
    found: dict[str, list[dict]] = {"smelt": [], "trl": []}
    for pair in range(asked.pairs):
        for who in ("smelt", "trl") if pair % 2 == 0 else ("trl", "smelt"):
            command = [python, __file__, "--worker", who, case, "--steps", str(asked.steps), "--home", asked.home]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
            if done.returncode:
                sys.exit(f"{who} failed in {case}:\n{done.stderr[-3000:]}")
            found[who].append(json.loads(done.stdout.splitlines()[-1]))
        a, b = found["smelt"][-1], found["trl"][-1]
        print(f"{case}, pair {pair + 1}: smelt {a['rate']:,.0f} tokens/s and {a['peak'] / 2**20:,.0f} MB,", end=" ")
        print(f"TRL {b['rate']:,.0f} tokens/s and {b['peak'] / 2**20:,.0f} MB", flush=True)
    for what, goal in (("rate", "above 1"), ("peak", "below 1")):
        ratios = sorted(a[what] / b[what] for a, b in zip(found["smelt"], found["trl"], strict=True))
        name = {"rate": "tokens/s", "peak": "peak memory above the start"}[what]
        print(f"{case}: {name}, smelt / TRL: {statistics.median(ratios):.3f} [{ratios[0]:.3f}, {ratios[-1]:.3f}]; goal: {goal}")
    ours, theirs = found["smelt"][0]["loss"], found["trl"][0]["loss"]
    print(f"{case}: last loss smelt {ours:.6f}, TRL {theirs:.6f}\n", flush=True)
    if case != "on-policy" and abs(ours - theirs) > 1e-4 * abs(theirs):
        sys.exit("they did not do the same training")


class Resident:
    """Peak resident bytes while the block runs, above those at its start, sampled every 5 ms."""

    def __enter__(self):
        self.start, self.most, self.running = resident(), 0, True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.most = max(self.most, resident())
            time.sleep(0.005)

    def __exit__(self, *error):
        self.running = False
        self.thread.join()

    @property
    def above(self) -> int:
        return self.most - self.start


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


class Clocked:
    """Rows that note when the first of them is taken."""

    def __init__(self, rows):
        self.rows, self.began = rows, 0.0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.began = self.began or time.perf_counter()
        return self.rows[index]


def prepare(case: str, steps: int, home: Path) -> dict:
    from smelt import run
    from smelt.data._tokens import tokenize
    from smelt.data.stdlib import Stdlib
    from smelt.model._load import load

    recipe = home / "prune.yaml"
    recipe.write_text("name: prune\nstages:\n  - weights: minitron(layers=5, ffn=320)\n    calibrate: {rows: 16, context: 256}\n")
    run(recipe, folder=home / "runs")
    (home / "runs" / "prune" / "model").rename(home / "student")
    tokenize(Stdlib(), "train", load("embedded").tokenizer, home / "tokens")
    return {}


def sides(home: Path, steps: int):
    import torch

    from smelt.data._tokens import Rows, Tokens
    from smelt.model._load import load

    torch.manual_seed(0)
    student, teacher = load(str(home / "student"), dtype=torch.float32), load("embedded", dtype=torch.float32)
    return student, teacher, Rows(Tokens(home / "tokens"), CONTEXT, BATCH * steps, 0)


def smelt_worker(case: str, steps: int, home: Path) -> dict:
    from smelt import registry
    from smelt.recipe import Training
    from smelt.train import Course

    student, teacher, rows = sides(home, steps)
    how = {"tokens": BATCH * CONTEXT * steps, "context": CONTEXT, "batch": BATCH, "lr": LR, "schedule": "constant", "warmup": 0.0}
    course = Course(student, (teacher,), rows.tokens, Training(**how), Path(tempfile.mkdtemp()))
    text = {"offline": "forward_kl()", "jsd": "generalized_jsd(beta=0.5)", "on-policy": f"gkd(share=1.0, prompt={PROMPT}, new={PROMPT})"}
    method, clocked = registry.parse(text[case], "distill"), Clocked(rows)
    course.rows = lambda *args, **kwargs: clocked  # type: ignore[method-assign]
    with Resident() as memory:
        log = method.teach(course) if case == "on-policy" else course.fit(method, rows=clocked)
        took = time.perf_counter() - clocked.began
    return {
        "rate": steps * BATCH * (PROMPT if case == "on-policy" else CONTEXT) / took,
        "peak": memory.above,
        "loss": log["log"][-1]["loss"],
    }


def trl_worker(case: str, steps: int, home: Path) -> dict:
    import datasets
    import torch
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    student, teacher, rows = sides(home, steps)
    student.tokenizer.pad_token = student.tokenizer.pad_token or student.tokenizer.eos_token

    def collate(items):
        ids = torch.stack([torch.cat([item["input_ids"], item["labels"][-1:]]) for item in items])
        made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        return made | {"prompts": ids[:, :PROMPT], "prompt_attention_mask": torch.ones_like(ids[:, :PROMPT])}

    clocked = Clocked(rows)
    arguments = GKDConfig(
        output_dir=tempfile.mkdtemp(), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=LR, lr_scheduler_type="constant",
        warmup_steps=0, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0, bf16=False, gradient_checkpointing=False,
        lmbda=1.0 if case == "on-policy" else 0.0, beta={"offline": 0.0}.get(case, 0.5), temperature=1.0, max_new_tokens=PROMPT,
        use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0,
    )  # fmt: skip
    placeholder = datasets.Dataset.from_dict({"text": [""] * len(rows)})
    trainer = GKDTrainer(
        model=student.model, teacher_model=teacher.model, args=arguments, data_collator=collate, train_dataset=placeholder,
        processing_class=student.tokenizer,
    )  # fmt: skip
    trainer.train_dataset = clocked
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(clocked)
    with Resident() as memory:
        trainer.train()
        took = time.perf_counter() - clocked.began
    loss = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1]
    return {"rate": steps * BATCH * (PROMPT if case == "on-policy" else CONTEXT) / took, "peak": memory.above, "loss": loss}


WORKERS = {"prepare": prepare, "smelt": smelt_worker, "trl": trl_worker}

if __name__ == "__main__":
    main()
