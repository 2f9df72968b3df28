"""Adapters: a few new weights that learn in the place of the model's own, which stand still. They are named in a `train:` block.

    train: {adapter: lora(rank=8), tokens: 500_000}

What is left is either a plain model (what was learned is merged into its weights) or one with modules of its own, which
loads in smelt. Either way it must compute what the trained one did: `learned` compares their logits, every time.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smelt import registry
from smelt.model._swap import put
from smelt.spec import SmeltError

__all__ = ["FOLDER", "TOLERANCE", "Adapter", "Attached", "fingerprint", "learned", "placed", "seeded"]

FOLDER = "adapter"  # beside the checkpoint: what was learned, where it can be had by itself
TOLERANCE = 1e-4  # of the largest logit, in float32: a merge rounds every weight once and sums in another order


class Attached(NamedTuple):
    """An adapter that is on a model."""

    finish: Callable[[], None]  # after the training: leave what is to be saved
    undo: Callable[[], None]  # put the model back as it was, when the training did not end
    save: Callable[[Path], None] | None = None  # write what was learned into a folder; None: the checkpoint says it all
    merged: bool = False  # `finish` leaves a plain model


class Adapter(ABC):
    """Settings of an adapter. Before it has learned anything the model computes what it did, bit for bit."""

    @abstractmethod
    def parameters(self, model: Any) -> int:
        """How many weights are trained; of a plain model, which may be on the meta device. Raises SmeltError where it does not fit."""

    @abstractmethod
    def attach(self, model: Any, seed: int) -> Attached:
        """Put it into a model whose weights are all frozen, in place; the new ones are drawn from `seed` and not frozen."""


def learned(
    adapter: Any, model: Any, train: Callable[[], dict[str, Any]], ids: Callable[[], Tensor], seed: int, place: Path
) -> dict[str, Any]:
    """What `train()` returns, run with an adapter on the model, and "adapter": what was trained, and how it was left.

    `ids()` [b, t] is the batch on which the model that is left is compared with the one that was trained. Raises SmeltError
    when their logits differ by more than TOLERANCE of the largest, and for what is not an adapter.
    """
    if not isinstance(adapter, Adapter):
        raise SmeltError(f"train: adapter: '{registry.text(adapter)}' is no adapter; one is lora(rank=8), another sequential_adapter()")
    free = [p for p in model.parameters() if p.requires_grad]
    total, expected = model.num_parameters(), adapter.parameters(model)
    model.requires_grad_(False)
    try:
        attached = adapter.attach(model, seed)
        try:
            trained = [p for p in model.parameters() if p.requires_grad]
            count = sum(p.numel() for p in trained)
            if count != expected:
                raise SmeltError(f"{registry.text(adapter)}: {count} weights would be trained, where its formula says {expected}")
            about = train()
            if attached.save is not None and int(os.environ.get("RANK", "0")) == 0:
                attached.save(place / FOLDER)
            batch = ids()
            wanted = _logits(model, batch)
        except BaseException:
            attached.undo()
            raise
        attached.finish()
    finally:
        for p in free:
            p.requires_grad_(True)
    error = _apart(_logits(model, batch), wanted)
    limit = TOLERANCE * torch.finfo(wanted.dtype).eps / torch.finfo(torch.float32).eps
    if not error <= limit:
        raise SmeltError(
            f"{registry.text(adapter)}: what is left of it differs from what was trained by {error:.2g} of its logits (at most {limit:.2g})"
        )
    size = sum(p.numel() * p.element_size() for p in trained)
    shown = {"method": registry.text(adapter), "trained": count, "share": count / total, "bytes": size}
    return about | {"adapter": shown | {"merged": attached.merged, "difference": error}}


@torch.no_grad()
def _logits(model: Any, ids: Tensor) -> Tensor:
    training = model.training
    model.eval()
    try:
        return model(input_ids=ids.to(model.device), use_cache=False).logits
    finally:
        model.train(training)


def _apart(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """New weights are drawn from the seed alone, and nothing else is: a run that goes on after a kill draws them again."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def placed(model: nn.Module, modules: Mapping[str, nn.Module], finish: Callable[[], None] = lambda: None) -> Attached:
    """Modules of smelt's own in the place of others; they stay there."""
    was = {name: model.get_submodule(name) for name in modules}

    def undo() -> None:
        for name, module in was.items():
            put(model, name, module)

    for name, module in modules.items():
        put(model, name, module.train(was[name].training))
    return Attached(finish, undo)


def fingerprint(weight: Tensor) -> str:
    """Sixteen hex digits of a weight's values as float32: the same for a bfloat16 checkpoint and for it loaded in float32."""
    values = weight.detach().float().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(repr(tuple(weight.shape)).encode() + values.tobytes()).hexdigest()[:16]
