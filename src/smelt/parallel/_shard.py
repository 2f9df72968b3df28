"""A model cut over all processes with torch's FSDP2, and put together again.

transformers' Trainer leaves FSDP to accelerate, which ignores it on CPUs; here torch's `fully_shard` does it, so that the
same code is tested over gloo on two processes and used on GPUs.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from smelt.model._walk import blocks

__all__ = ["gathered", "load_optimizer", "optimizer_state", "scatter", "shard"]

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of `model` whose weights lie in equal parts on all processes; a block's are gathered while it runs.

    Memory per process: weights, gradients and optimizer state / processes, and one whole block besides. Traffic per
    micro-batch: two gathers and one reduction of all weights.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    cut = copy.deepcopy(model)
    for block in blocks(cut):
        fully_shard(block, mesh=mesh)
    fully_shard(cut, mesh=mesh)
    return cut


def _named(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


@torch.no_grad()
def gathered(cut: nn.Module, whole: nn.Module) -> None:
    """Copy the weights of `cut` into `whole`, tensor by tensor. Every process calls it."""
    target = _named(whole)
    for name, value in _named(cut).items():
        target[name].copy_(value.full_tensor() if isinstance(value, DTensor) else value)


@torch.no_grad()
def scatter(whole: nn.Module, cut: nn.Module) -> None:
    """Copy the weights of `whole`, equal on every process, into `cut`."""
    source = _named(whole)
    for name, value in _named(cut).items():
        if isinstance(value, DTensor):
            value.copy_(distribute_tensor(source[name].to(value.device), value.device_mesh, value.placements))
        else:
            value.copy_(source[name])


def optimizer_state(cut: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The whole state by parameter name, on the first process; every process calls it."""
    return get_optimizer_state_dict(cut, optimizer, options=WHOLE)


def load_optimizer(cut: nn.Module, optimizer: torch.optim.Optimizer, file: Path) -> None:
    state = torch.load(file, map_location="cpu", weights_only=True)
    set_optimizer_state_dict(cut, optimizer, state, options=StateDictOptions(full_state_dict=True))
