"""Modules that stand where an architecture has others: a factorized map, an adapter, another attention.

A checkpoint that holds some is no longer one of the architecture it came from, and must not load as one: transformers
would fill what it misses with random numbers. So config.json says `"model_type": "smelt"`, which plain transformers
refuses by name, and keeps what it said before beside the list of modules:

    {"model_type": "smelt", "smelt": {"model_type": "mistral", "modules": {"layers.0.up_proj": ["weights.low_rank", {"rank": 64}]}}, ...}

`smelt.model._load.load` builds the architecture, puts each module in its place and reads the weights into it.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from smelt import registry
from smelt.spec import SmeltError

__all__ = ["TYPE", "Swapped", "SwappedLinear", "described", "original", "put", "swap", "swapped"]

TYPE = "smelt"


class Swapped(nn.Module, ABC):
    """A module that stands in another's place. `owner` is "family.file" of the method it belongs to, whose class names it as `module`.

    Its weights are ordinary parameters and buffers. Together with `settings()`, which JSON can hold, they are all of it.
    """

    owner: ClassVar[str]
    opens: ClassVar[bool] = False  # modules inside it may be swapped themselves, and are listed as well

    @abstractmethod
    def settings(self) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def build(cls, was: Any, *args: Any, **settings: Any) -> Self:
        """An empty one for the place of `was`, before its weights are read. Raises SmeltError for settings that do not fit."""


class SwappedLinear(Swapped):
    """Stands for a linear map in -> out: `product(x)` is what W x was; the bias is added here."""

    def __init__(self, in_features: int, out_features: int, bias: nn.Parameter | None = None):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = bias

    @abstractmethod
    def product(self, x: Tensor) -> Tensor: ...  # [..., in] -> [..., out]

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix [out, in] nearest to it, in the dtype of its weights: what `relative_change` is measured with."""

    def forward(self, x: Tensor) -> Tensor:
        made = self.product(x)
        return made if self.bias is None else made + self.bias


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)


def swapped(model: nn.Module) -> Iterator[tuple[str, Swapped]]:
    """(full name, module) of those that are not inside another, the outer before those in it that `opens`."""
    inside: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, Swapped) and not any(name.startswith(f"{owner}.") for owner in inside):
            if not module.opens:
                inside.append(name)
            yield name, module


def described(model: nn.Module, folder: Path) -> None:
    """Write into the config.json of a checkpoint just saved which modules it holds. Does nothing when there are none."""
    modules = {name: [module.owner, module.settings()] for name, module in swapped(model)}
    if not modules:
        return
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {"model_type": TYPE, TYPE: {"model_type": config["model_type"], "modules": modules}}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def original(config: dict[str, Any], file: str) -> tuple[dict[str, Any], dict[str, tuple[str, dict[str, Any]]]]:
    """(configuration of the architecture, modules by name) of a config.json that says "smelt". Raises SmeltError for a malformed one."""
    found = config.get(TYPE)
    about: dict[str, Any] = found if isinstance(found, dict) else {}
    modules = about.get("modules")
    listed: dict[str, Any] = modules if isinstance(modules, dict) else {"": None}
    good = all(isinstance(v, list) and len(v) == 2 and isinstance(v[0], str) and isinstance(v[1], dict) for v in listed.values())
    if not good or not isinstance(about.get("model_type"), str) or about["model_type"] == TYPE:
        raise SmeltError("'model_type' is \"smelt\", but 'smelt' does not list a model_type and modules", file=file)
    plain = {k: v for k, v in config.items() if k != TYPE} | {"model_type": about["model_type"]}
    return plain, {name: (v[0], v[1]) for name, v in listed.items()}


def swap(model: nn.Module, modules: dict[str, tuple[str, dict[str, Any]]], file: str) -> None:
    """Put the modules of a checkpoint in their places, empty. Only methods of the registry are asked for theirs."""
    for name, (owner, settings) in modules.items():
        family, _, method = owner.partition(".")
        kind = getattr(registry.load(family, method), "module", None) if method in registry.names(family) else None
        if not (isinstance(kind, type) and issubclass(kind, Swapped)):
            raise SmeltError(f"the module '{name}' is of '{owner}', and this smelt has no such module", file=file)
        try:
            was = model.get_submodule(name)
            put(model, name, kind.build(was, **settings))
        except (AttributeError, TypeError, ValueError) as error:
            raise SmeltError(f"the module '{name}' of '{owner}' cannot be built: {error}", file=file) from error
