"""Outlier channels planted into a model, its function unchanged: what large models have and small ones lack."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from smelt.model._walk import blocks, fold, folds
from smelt.spec import Paper, SmeltError
from smelt.weights._whole import Restructure

__all__ = ["PlantedOutliers"]


@dataclass(frozen=True)
class PlantedOutliers(Restructure):
    """g_j * factor, W_:j / factor for `channels` random j of every norm's gain g and each map W that reads the norm.

    The product W_:j g_j x_j is what it was, up to rounding (to the bit where factor is a power of 2), but the inputs
    of q, k, v and of gate, up now have channels `factor` times larger than the others, as large models do by
    themselves. A test bed, not a compression: put it before a method to see whether activations matter to it. Same
    shapes, nothing measured, the calibration rows are not read. Cost: a copy of the model.

    Raises SmeltError for more channels than the model has, and for blocks that are no gated decoder blocks with norms.
    Differs from the paper: it finds such channels, in 6.7B parameters up to 20 times larger and concentrated in 6, the
    same in all layers; here they are made, and drawn anew for each norm (reconstruction: the construction is not the
    paper's).
    """

    paper: ClassVar = Paper("LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", "arXiv:2208.07339", "section 4")
    gentlest: ClassVar[Mapping[str, Any]] = {"channels": 0}
    channels: Annotated[int, Ge(0)] = 6  # of every norm
    factor: Annotated[float, Gt(0)] = 20.0
    seed: Annotated[int, Ge(0)] = 0  # of the choice of channels

    def target(self, config: Any) -> Any:
        if self.channels > config.hidden_size:
            raise SmeltError(f"planted_outliers: channels={self.channels} is more than the model's {config.hidden_size}")
        return config

    def __call__(self, model: Any, rows: Iterable[Mapping[str, Tensor]]) -> Any:
        self.target(model.config)
        made, draw = copy.deepcopy(model), torch.Generator().manual_seed(self.seed)
        for block in blocks(made):
            for found in folds(block):
                if isinstance(found.source, nn.Linear):
                    continue
                size = found.readers[0].in_features
                scale = torch.ones(size, dtype=torch.float64)
                scale[torch.randperm(size, generator=draw)[: self.channels]] /= self.factor
                fold(found, scale.to(found.readers[0].weight.device))
        return made
