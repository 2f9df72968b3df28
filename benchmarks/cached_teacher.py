"""A teacher kept on disk against one in memory: `python benchmarks/cached_teacher.py`, about ten minutes.

The embedded model teaches a student pruned from it by forward KL, once with the teacher beside the student and once with
its 64 likeliest tokens read from disk (`teacher: {model: base, cache: topk(k=64)}`), from the same weights on the same
rows, in turns in one process, one pair for each seed. Printed: tokens per second of the training (the one pass that fills
the cache is done before it), cached / online, the median of the pairs with the smallest and largest; what the cache takes
on disk and loses; and bits per byte on
held-out text after both, their ratio over the seeds. Goal: at least 1.5 times the tokens per second at no measurable loss.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from smelt.compress import calibration_rows, compress
from smelt.data._tokens import tokenize
from smelt.data.stdlib import Stdlib
from smelt.distill.forward_kl import ForwardKL
from smelt.evaluate import Variant
from smelt.evaluate.perplexity import Perplexity
from smelt.model._load import Loaded, load
from smelt.recipe import Training
from smelt.train import teach
from smelt.weights.minitron import Minitron


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--tokens", type=int, default=65_536)
    ask.add_argument("--k", type=int, default=64)
    ask.add_argument("--tail", choices=("student", "uniform", "sampled"), default="student")
    ask.add_argument("--draws", type=int, default=32, help="of a sampled tail")
    asked = ask.parse_args()
    teacher = load("embedded", dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        tokens = tokenize(Stdlib(), "train", teacher.tokenizer, folder / "tokens")
        settings = Training(data=Stdlib(), tokens=asked.tokens, context=256, batch=16, optimizer="muon", lr=3e-3)
        rates, quality = [], []
        for seed in range(asked.seeds):
            rows = calibration_rows(tokens, 64, 256, 8, seed)
            student, _ = compress(copy.deepcopy(teacher.model), teacher.tokenizer, Minitron(layers=5, ffn=320), rows)
            cached = replace(settings, teacher={"model": "base", "cache": f"topk(k={asked.k}, tail='{asked.tail}', draws={asked.draws})"})
            about = {}
            for name, how in (("online", settings), ("cached", cached))[:: 1 if seed % 2 == 0 else -1]:
                made = Loaded(copy.deepcopy(student), teacher.tokenizer, teacher.folder)
                log = teach(made, teacher, tokens, ForwardKL(), how, folder / f"{name}-{seed}", seed=seed, cache_folder=folder / "kept")
                metrics = Perplexity(tokens=32_768)(Variant(name, made.model, made.tokenizer, data=Stdlib()))
                about[name] = log["tokens"] / log["seconds"], {m.name: m.value for m in metrics}["bits_per_byte"]
                about |= log.get("cache", {})
            rates.append(about["cached"][0] / about["online"][0])
            quality.append(about["cached"][1] / about["online"][1])
            print(
                f"seed {seed}: online {about['online'][0]:,.0f} tokens/s and {about['online'][1]:.4f} bits per byte, cached "
                f"{about['cached'][0]:,.0f} and {about['cached'][1]:.4f}; cache {about['bytes_per_token']:.0f} bytes per token, "
                f"KL(p || p~) {about['kl']:.4f} nats, tail {about['tail']:.3f}",
                flush=True,
            )
    print(f"tokens/s, cached / online: {statistics.median(rates):.3f} [{min(rates):.3f}, {max(rates):.3f}]; goal: at least 1.5")
    print(f"bits per byte, cached / online: {statistics.median(quality):.4f} [{min(quality):.4f}, {max(quality):.4f}]; goal: 1")


if __name__ == "__main__":
    main()
