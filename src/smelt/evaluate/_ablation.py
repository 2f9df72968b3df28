"""Do averages of models rank mixtures of data as trainings on those mixtures do?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from smelt.spec import SmeltError

__all__ = ["Ablation", "ablation", "spearman"]

Losses = Mapping[frozenset[str], Sequence[float]]  # {parts of the corpus: loss of each seed}


class Ablation(NamedTuple):
    """One entry for each seed; `below` counts pairs of all seeds."""

    merged: list[float]  # Spearman's correlation of the averages' losses with those of the trainings on unions
    single: list[float]  # the same of the mean loss of the two units, which needs no average
    below: int  # averages that are not worse than the mean loss of their units: the units lie in one basin
    pairs: int


def ablation(units: Losses, merged: Losses, unions: Losses) -> Ablation:
    """Over all pairs of parts. Raises SmeltError when a pair, a unit or a seed of one of them is missing."""
    order = sorted(unions, key=sorted)
    for pair in order:
        for name, losses, key in [("average", merged, pair), *(("unit", units, frozenset([part])) for part in pair)]:
            if len(losses.get(key, ())) != len(unions[pair]):
                raise SmeltError(f"data ablation: the {name} of {' + '.join(sorted(key))} has not the seeds that its union has")
    if len(order) < 3:
        raise SmeltError(f"data ablation: {len(order)} mixtures are no ranking; at least three are needed")
    true = np.array([unions[pair] for pair in order]).T  # [seeds, pairs]
    ours = np.array([merged[pair] for pair in order]).T
    means = np.array([np.mean([units[frozenset([part])] for part in pair], 0) for pair in order]).T
    return Ablation(
        [spearman(a, b) for a, b in zip(ours, true)],
        [spearman(a, b) for a, b in zip(means, true)],
        int((ours <= means).sum()),
        ours.size,
    )


def spearman(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> float:
    """Pearson's correlation of the ranks, equal values sharing the mean of theirs; NaN when one side is all alike."""
    x, y = (_ranks(np.asarray(values, float)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / size if size else float("nan")


def _ranks(values: np.ndarray) -> np.ndarray:
    less = (values[None] < values[:, None]).sum(1)
    alike = (values[None] == values[:, None]).sum(1)
    return less + (alike + 1) / 2
