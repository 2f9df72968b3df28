"""The optimizer of a training and its learning rate at every step."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from smelt.optim import Muon
from smelt.recipe import Training

__all__ = ["optimizer_of", "rate"]


def optimizer_of(model: PreTrainedModel, settings: Training, equipment: nn.Module | None = None) -> torch.optim.Optimizer:
    """Matrices inside the blocks to Muon where it is asked for; embeddings, head, vectors and equipment to AdamW."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if equipment is not None:
        known = {id(p) for p in model.parameters()}  # equipment may hold a part of the student
        trained += [(name, p) for name, p in equipment.named_parameters() if p.requires_grad and id(p) not in known]
    inner = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None}
    if settings.optimizer == "muon":
        matrices: list[Tensor] = [p for _, p in trained if p.dim() == 2 and id(p) in inner and id(p) not in outer]
        chosen = {id(p) for p in matrices}
        return Muon(matrices, [p for _, p in trained if id(p) not in chosen], settings.lr, settings.weight_decay)
    groups = [
        {"params": [p for _, p in trained if p.dim() > 1], "weight_decay": settings.weight_decay},
        {"params": [p for _, p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=settings.lr, betas=(0.9, 0.95), eps=1e-8)


def rate(at: int, steps: int, settings: Training) -> float:
    """Learning rate of step `at` as a share of lr: linear warm-up, then the schedule down to `floor`."""
    warm = math.ceil(settings.warmup * steps)
    if at < warm:
        return (at + 1) / warm
    share = min(1.0, (at - warm) / max(1, steps - warm))
    if settings.schedule == "constant":
        return 1.0
    fall = 0.5 * (1 + math.cos(math.pi * share)) if settings.schedule == "cosine" else 1 - share
    return settings.floor + (1 - settings.floor) * fall
