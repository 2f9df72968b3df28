"""Other mixers in the place of a model's attention, taught beforehand to give what it gave."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smelt import registry
from smelt.attention._mixer import Converting, Transferring, place
from smelt.attention._mixer import convert as mixers
from smelt.data._tokens import Rows, Tokens
from smelt.model._load import Loaded
from smelt.model._walk import parts
from smelt.recipe import Training
from smelt.spec import SmeltError

__all__ = ["convert"]


def convert(
    model: Loaded,
    tokens: Tokens | None,
    method: Converting,
    settings: Training | None,
    folder: Path,
    *,
    seed: int = 0,
    label: str = "convert",
) -> dict[str, Any]:
    """Put the mixers of a `Converting` method in the place of `model.model`'s attention; with settings they are taught first.

    Taught: the model stands still and reads every row as it is; each mixer reads what its attention read and is trained
    on `method.lost` against it, all layers at once, none seeing another. What `train` returns, with the parameters trained.
    One process, whole rows: raises SmeltError for a teacher, an adapter, shard, boundaries=mask.
    """
    from smelt._train_loop import train  # here, as in `smelt.train`

    net = model.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = mixers(net, method)
    for _, mixer in made.values():
        mixer.to(net.device)
    if settings is None:
        place(net, made)
        return {"report": {"converted": sorted(made)}}
    if not isinstance(method, Transferring):
        raise SmeltError(f"train: {registry.text(method)} has no stage of its own; train the converted model in a distill stage after it")
    assert tokens is not None
    for key in [key for key, value in {"teacher": settings.teacher, "adapter": settings.adapter}.items() if value is not None]:
        raise SmeltError(f"train: a mixer learns from the attention it replaces; leave out '{key}'")
    if settings.shard != "none" or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SmeltError("train: a conversion is trained on one process; leave out 'shard' and torchrun")
    if settings.boundaries != "cross":
        raise SmeltError("train: a conversion reads whole rows; leave out boundaries=mask")
    if settings.context > parts(net.config.get_text_config(decoder=True)).context:
        raise SmeltError(f"train: context={settings.context} is longer than the positions of the model")
    free = [p for p in net.parameters() if p.requires_grad]
    for p in free:
        p.requires_grad_(False)
    new = torch.nn.ModuleDict({str(i): mixer for i, (_, mixer) in made.items()})
    new.requires_grad_(False)
    for _, mixer in made.values():
        for p in method.learned(mixer):
            p.requires_grad_(True)
    own = torch.nn.ParameterDict({name.replace(".", "/"): p for name, p in new.named_parameters() if p.requires_grad})
    read: dict[int, tuple[Tensor, Any]] = {}
    listening: list[bool] = []  # not while a method asks the attention itself

    def reader(index: int) -> Callable[..., None]:
        def see(module: Any, args: tuple, given: dict[str, Any]) -> None:
            if not listening:
                return
            hidden = given["hidden_states"] if "hidden_states" in given else args[0]
            read[index] = hidden, given["position_embeddings"]

        return see

    def step(_: Any, inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        net.eval()  # the loop sets what it trains to training, this model with it
        with torch.no_grad():
            listening.append(True)
            net.base_model(input_ids=inputs["input_ids"], use_cache=False)
            listening.clear()
        losses = [method.lost(mixer, was, *read.pop(index), progress) for index, (was, mixer) in made.items()]
        loss = torch.stack(losses).mean(0)
        return loss, torch.ones_like(loss, dtype=torch.bool)

    hooks = [was.register_forward_pre_hook(reader(index), with_kwargs=True) for index, (was, _) in made.items()]
    rows = Rows(tokens, settings.context, settings.steps * settings.batch, seed)
    try:
        log = train(net, rows, step, settings, folder, seed, label, equipment=own)
    finally:
        for hook in hooks:
            hook.remove()
        new.requires_grad_(True)
        for p in free:
            p.requires_grad_(True)
    place(net, made)
    trained = sum(p.numel() for p in own.values())
    return log | {"report": {"converted": sorted(made), "trained": trained}}
