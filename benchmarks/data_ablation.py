"""Can averages of models stand for trainings on mixtures? `python benchmarks/data_ablation.py`, about an hour and a half.

Runs recipes/data_ablation.yaml (four units, each trained on one package of the standard library, and the averages of their
pairs) and recipes/data_ablation_unions.yaml (a training on every pair), three seeds, from one start. Prints, for each seed,
Spearman's correlation of the averages' losses with those of the trainings, beside that of the mean loss of the two units,
which costs no average; and how many averages are not worse than that mean (one that is: its units left the basin).
"""

from __future__ import annotations

import argparse
import ast
import re
from pathlib import Path
from typing import Any

from smelt import run
from smelt.evaluate._ablation import Losses, ablation
from smelt.recipe import shipped


def losses(results: dict[str, Any]) -> tuple[Losses, Losses]:
    """(of trainings, of averages): {packages: bits per byte of each seed}. Two orders of one pair are averaged."""
    found: tuple[dict, dict] = {}, {}
    for variant in results["variants"]:
        packages = re.findall(r"packages=(\([^)]*\))", variant["name"])
        if packages:
            key = frozenset(name for text in packages for name in ast.literal_eval(text))
            found["linear(" in variant["name"]].setdefault(key, []).append(variant["metrics"]["bits_per_byte"]["seeds"])
    return tuple({key: [sum(seed) / len(seed) for seed in zip(*rows)] for key, rows in part.items()} for part in found)  # type: ignore[return-value]


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--folder", type=Path, default=Path("runs"))
    ask.add_argument("--tokens", type=int, default=32_768, help="of each unit; a union has twice as many")
    asked = ask.parse_args()
    made = []
    for name, times in (("data_ablation", 1), ("data_ablation_unions", 2)):
        changes = {"train.tokens": str(times * asked.tokens)}
        made.append(
            losses(run(shipped("recipes") / f"{name}.yaml", folder=asked.folder, store=asked.folder / "data_ablation", overrides=changes))
        )
    (units, merged), (unions, _) = made
    for key in sorted(unions, key=sorted):
        print(f"{' + '.join(sorted(key)):<28} trained on both {_shown(unions[key])}   average {_shown(merged[key])}")
    found = ablation(units, merged, unions)
    print(f"Spearman over {len(unions)} pairs, of each seed: average {_shown(found.merged)}; mean of the two units {_shown(found.single)}")
    print(f"averages not worse than the mean of their units: {found.below} of {found.pairs}")


def _shown(values: Any) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


if __name__ == "__main__":
    main()
