"""Caches that are measured on text beforehand: subspaces, thresholds, tables.

What is measured is kept in `cache.safetensors` of a folder that the method's field `weights` names. In a recipe the stage
makes that folder (`- cache: kvquant(bits=3)`, with a `calibrate:` block or the recipe's own text); in Python
`method.calibrated(model, batches, folder)` does. The file names the method and the sizes it was measured for.
"""

from __future__ import annotations

import dataclasses
import json
from abc import abstractmethod
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self, cast

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from smelt import registry
from smelt.cache import KVCache
from smelt.model._walk import parts
from smelt.spec import SmeltError

__all__ = ["FILE", "Calibrated"]

FILE = "cache.safetensors"


class Calibrated(KVCache):
    calibrates: ClassVar[bool] = True
    weights: Any  # the last field: folder with cache.safetensors, None until it was measured

    @abstractmethod
    def fits(self, config: Any) -> None:
        """Raises SmeltError where the shapes of a model of this (text) configuration do not fit. Needs no calibration."""

    @abstractmethod
    def measure(self, model: Any, batches: Iterable[Tensor]) -> dict[str, Tensor]:
        """{"LAYER.name": tensor} from ids [b, t] of calibration text. The model is left as it was, gradients cleared."""

    def calibrated(self, model: Any, batches: Iterable[Tensor], folder: Path) -> Self:
        """This method with what it measured written into `folder`."""
        found = {name: value.detach().cpu().contiguous() for name, value in self.measure(model, batches).items()}
        about = {"method": registry.name_of(self)[1], "text": registry.text(self), "sizes": _sizes(model.config)}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(found, folder / FILE, {"smelt": json.dumps(about)})
        return dataclasses.replace(cast(Any, self), weights=str(folder))

    def state(self, config: Any, index: int) -> dict[str, Tensor]:
        """What was measured of one layer, read once per file. Raises SmeltError where nothing was, or for another model."""
        name = registry.name_of(self)[1]
        file = Path(self.weights) / FILE if self.weights else None
        if file is None or not file.is_file():
            raise SmeltError(
                f"cache: {name} has to be measured on text first: a recipe's stage '- cache: {registry.text(self)}' does it; "
                f"elsewhere name the folder it made: {name}(weights='runs/NAME/stages/{name}-...')"
            )
        about, held = _read(str(file), file.stat().st_mtime_ns)
        if about.get("method") != name:
            raise SmeltError(f"cache: '{file}' was measured for the method '{about.get('method')}', not for {name}")
        if about.get("sizes") != _sizes(config):
            raise SmeltError(f"cache: '{file}' was measured on a model of other sizes; measure {name} on this one")
        start = f"{index}."
        return {key.removeprefix(start): value for key, value in held.items() if key.startswith(start)}


def _sizes(config: Any) -> list[int]:
    sizes = parts(config)
    return [sizes.layers, sizes.kv_heads, sizes.head_dim, sizes.hidden]


@lru_cache(maxsize=8)
def _read(file: str, _: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, "pt") as opened:
            about = json.loads((opened.metadata() or {}).get("smelt", "{}"))
        return about, load_file(file)
    except (OSError, SafetensorError, ValueError) as error:
        raise SmeltError(f"cache: '{file}' cannot be read: {str(error).splitlines()[0][:200]}") from error
