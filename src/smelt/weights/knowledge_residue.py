"""Put what a model learned into another model of the same base, without its small changes (Mistral-C2F; reconstruction)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Interval
from torch import Tensor

from smelt.spec import Paper, SmeltError
from smelt.weights._merge import Merge, largest, together, wide

__all__ = ["KnowledgeResidue"]


@dataclass(frozen=True)
class KnowledgeResidue(Merge):
    """theta = theta_instruct + scale * trim(theta_coarse - theta_0); trim keeps the round(density * n) largest of each tensor.

    theta_coarse is the stage's own model (in the paper trained by reinforcement learning for long analyses),
    theta_instruct the one in `models`, theta_0 the base of both. scale=0 is the instruct model, bit for bit; with the
    base as instruct model, density=1 and scale=1 it is the coarse one up to rounding. Cost: one selection of O(n) for
    n weights, no data; memory: n bytes and four tensors.

    Reconstruction: the paper's abstract and model card say that the coarse actor is merged into an existing instruct
    model to keep its analyses and lose redundancy; the formula was not to be had. This is ties with one task vector,
    put onto another model than its base.

    Raises SmeltError unless there is exactly one other model.
    """

    paper: ClassVar = Paper(
        "Mistral-C2F: Coarse to Fine Actor for Analytical and Reasoning Enhancement in RLHF and Effective-Merged LLMs",
        "arXiv:2406.08657",
        "abstract; the formula is a reconstruction",
    )
    needs_base: ClassVar[bool] = True
    models: tuple[str, ...] = ("base",)  # the instruct model
    base: str = "base"  # what both were trained from
    density: Annotated[float, Interval(gt=0, le=1)] = 0.2  # share of the changes that stays
    scale: Annotated[float, Interval(ge=0, le=10)] = 1.0

    def __post_init__(self) -> None:
        if len(self.models) != 1:
            raise SmeltError(f"knowledge_residue: one instruct model is expected; models={list(self.models)} names {len(self.models)}")

    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
        start, coarse, instruct = together(self, tensors, base)
        change = wide(coarse) - wide(start)
        onto = wide(instruct)
        return torch.where(largest(change, self.density), onto + self.scale * change, onto).to(coarse.dtype)
