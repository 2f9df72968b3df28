"""Which size of teacher suits a small student best: `python benchmarks/capacity_gap.py`, about forty minutes.

Runs recipes/capacity_gap.yaml (one two-layer student, teachers of 8, 6, 4 and 3 layers, the same tokens, three seeds),
prints what the student came to under each teacher, and fits a parabola through bits per byte over the logarithm of
the teacher's parameters, with a 95 % bootstrap interval. "No interior optimum" means that the largest or the smallest
teacher was best, or might have been.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from smelt import run
from smelt.evaluate._capacity import optimum
from smelt.recipe import shipped


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--folder", type=Path, default=Path("runs"))
    ask.add_argument("--tokens", type=int, default=65_536, help="of every training")
    asked = ask.parse_args()
    results = run(shipped("recipes") / "capacity_gap.yaml", folder=asked.folder, overrides={"train.tokens": str(asked.tokens)})
    figures = {v["name"]: v["metrics"] for v in results["variants"]}
    teachers = ["base", *(name for name in figures if re.fullmatch(r"(.*\.)?minitron\(layers=\d\)\.forward_kl", name))]
    taught = [name for name in figures if "ensemble" in name]
    sizes, losses = [], []
    for teacher, student in zip(teachers, taught, strict=True):
        seeds = figures[student]["bits_per_byte"]["seeds"]
        sizes.append(figures[teacher]["parameters"]["value"])
        losses.append(seeds)
        shown = ", ".join(f"{value:.4f}" for value in seeds)
        print(
            f"teacher {teacher} ({sizes[-1] / 1e6:.2f} M, {figures[teacher]['bits_per_byte']['value']:.4f} bits per byte): student {shown}"
        )
    found = optimum(sizes, losses)
    text = f"{found.size / 1e6:.2f} M" if found.size else "no interior optimum"
    print(f"best teacher: {text}; 95 % interval {found.low / 1e6:.2f} to {found.high / 1e6:.2f} M parameters")


if __name__ == "__main__":
    main()
