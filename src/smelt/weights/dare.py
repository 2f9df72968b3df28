"""Drop most of each task vector at random, rescale the rest, and merge what is left by another method."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from smelt import registry
from smelt.spec import Paper, SmeltError
from smelt.weights._merge import Merge, together, wide
from smelt.weights.task_arithmetic import TaskArithmetic

__all__ = ["Dare"]


@dataclass(frozen=True)
class Dare(Merge):
    """theta_i' = theta_0 + m_i (theta_i - theta_0) / (1 - drop), m_i ~ Bernoulli(1 - drop) entry by entry; then `merge`.

    The mean over masks is theta_i, the variance of an entry d^2 drop / (1 - drop). `merge` is a method with a base
    and names it and the models: task_arithmetic() by default, or dare(merge=ties(models=["b"])). drop=0 is `merge`
    alone, bit for bit. The mask follows from seed, tensor name and place of the model, so neither the order of the
    tensors nor the files they lie in matter; exchanging models exchanges masks. Cost: one random number for each weight
    of each model, no data; memory: a tensor more for each model.

    Works while the changes are small beside the weights (the paper: below about 0.002, and not after continued
    pretraining); above drop=0.99 the rescaled rest explodes.

    Raises SmeltError when `merge` is no merging method with a base.
    """

    paper: ClassVar = Paper(
        "Language Models are Super Mario: Absorbing Abilities from Homologous Models", "arXiv:2311.03099", "section 3.2"
    )
    needs_base: ClassVar[bool] = True
    merge: Any = field(default_factory=TaskArithmetic)  # what the rest goes through; it names the models and the base
    drop: Annotated[float, Interval(ge=0, lt=1)] = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.merge, Merge):
            raise SmeltError(f"dare: merge={self.merge!r} is no merging method; write merge=task_arithmetic() or merge=ties()")
        if not self.merge.needs_base:
            name = registry.name_of(self.merge)[1]
            raise SmeltError(f"dare: merge={name}() has no base to take the changes from; write merge=task_arithmetic() or merge=ties()")

    @property
    def models(self) -> tuple[str, ...]:
        return self.merge.models

    @property
    def base(self) -> str:
        return self.merge.base

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        start, *models = together(self, tensors, base)
        start = wide(start)
        sparse = [self._dropped(f"{self.seed} {at} {name}", start, model) for at, model in enumerate(models)]
        return self.merge(name, sparse, start).to(tensors[0].dtype)

    def _dropped(self, draw: str, start: Tensor, model: Tensor) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:7], "big")
        keep = torch.empty(model.shape, dtype=torch.bool).bernoulli_(1 - self.drop, generator=torch.Generator().manual_seed(seed))
        return torch.where(keep.to(start.device), torch.lerp(start, wide(model), 1 / (1 - self.drop)), start)
