"""Merge task vectors whose entries disagree: keep the largest, elect a sign, average those that have it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from smelt.spec import Paper
from smelt.weights._merge import Merge, largest, together, wide

__all__ = ["Ties"]

CHUNK = 1 << 18  # entries


@dataclass(frozen=True)
class Ties(Merge):
    """theta = theta_0 + scale * mean of the trimmed d_i whose sign is that of sum_i d_i, entry by entry; d_i = theta_i - theta_0.

    Trim: of each tensor's d_i the round(density * n) entries of largest magnitude stay (ties: the first in memory
    order), the others count as zero. Elect: the sign of the sum of what stays. Merge: the mean over the models that
    have this sign; zeros do not count. Where the sum is zero, or nothing stays, the base stays.

    theta_1 is the stage's own model. One model with density=1, scale=1 is returned bit for bit, and so are equal ones;
    the order of the models is irrelevant up to rounding. Cost: one selection of O(n) for each model of n weights, no
    data; memory: n bytes for each model and five tensors.

    The election is discontinuous: where the d_i cancel up to rounding, rounding elects.

    Differs from the paper: trimmed per tensor, not over all weights at once; entries whose sum is exactly zero stay at
    the base instead of taking the majority sign of the others.
    """

    paper: ClassVar = Paper("TIES-Merging: Resolving Interference When Merging Models", "arXiv:2306.01708", "section 4.2, algorithm 1")
    needs_base: ClassVar[bool] = True
    models: tuple[str, ...] = ()
    base: str = "base"  # what the models were trained from
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2  # share of each task vector that stays
    scale: Annotated[float, Interval(ge=0, le=10)] = 1.0

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        start, *models = (t.flatten() for t in together(self, tensors, base))
        kept = [largest(wide(model) - wide(start), self.density) for model in models]
        result = torch.empty_like(models[0])
        for at in range(0, len(start), CHUNK):  # entry by entry from here on: a chunk at a time keeps the temporaries small
            part = slice(at, at + CHUNK)
            result[part] = self._merged(wide(start[part]), [wide(m[part]) for m in models], [k[part] for k in kept])
        return result.view(tensors[0].shape)

    def _merged(self, start: Tensor, models: Sequence[Tensor], kept: Sequence[Tensor]) -> Tensor:
        changes = [(model - start) * keep for model, keep in zip(models, kept)]
        elected = torch.stack(changes).sum(0).sign()
        mean, count = start, torch.zeros_like(start)
        for model, change in zip(models, changes):
            agree = (change.sign() == elected) & (elected != 0)
            count.add_(agree)
            # lerp is exact at weight 1 and between equal ends, which a sum divided by a count is not
            mean = torch.where(agree, torch.lerp(mean, model, 1 / count.clamp(min=1)), mean)
        return torch.lerp(start, mean, self.scale)
