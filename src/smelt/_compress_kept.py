"""Compressed blocks on disk: what a calibration that was killed need not do again."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from smelt import registry
from smelt.model._swap import put, swapped
from smelt.weights import Codes

__all__ = ["keep_block", "kept_blocks"]


def keep_block(place: Path, index: int, block: nn.Module, prefix: str, codes: dict[str, Codes], about: dict[str, Any]) -> None:
    """One file per block: its weights as they are now, the codes of its quantized maps, `about` as JSON. Whole or not there."""
    place.mkdir(parents=True, exist_ok=True)
    tensors = {f"block.{name}": value.contiguous() for name, value in block.state_dict().items()}
    quantized: dict[str, dict[str, int]] = {}
    for name, code in codes.items():
        if name.startswith(prefix):
            short = name.removeprefix(prefix)
            quantized[short] = {"bits": code.bits, "group": code.group}
            parts = {"code": code.code, "scale": code.scale, "zero": code.zero}
            tensors |= {f"codes.{short}.{key}": value.contiguous() for key, value in parts.items() if value is not None}
    modules = {name: [module.owner, module.settings()] for name, module in swapped(block)}
    words = {"codes": quantized, "modules": modules, "about": about}
    file = place / f"block-{index}.safetensors"
    save_file(tensors, file.with_suffix(".part"), metadata={"smelt": json.dumps(words)})
    with open(file.with_suffix(".part"), "rb") as written:
        os.fsync(written.fileno())
    os.replace(file.with_suffix(".part"), file)


def kept_blocks(place: Path, blocks: nn.ModuleList, prefix: str) -> tuple[int, dict[str, Codes], dict[str, Any]]:
    """Put the first blocks back as they were kept. Returns how many there are, their codes, and the last `about`."""
    found: dict[str, Codes] = {}
    about: dict[str, Any] = {}
    for index, block in enumerate(blocks):
        file = place / f"block-{index}.safetensors"
        if not file.is_file():
            return index, found, about
        with safe_open(file, "pt") as source:
            words = json.loads(source.metadata()["smelt"])
            tensors = {key: source.get_tensor(key) for key in source.keys()}  # noqa: SIM118
        for name, (owner, settings) in words["modules"].items():
            kind: Any = registry.load(*owner.split(".", 1))
            made = kind.module.build(block.get_submodule(name), **settings)
            put(block, name, made.to(next(block.parameters()).device))
        block.load_state_dict({key.removeprefix("block."): value for key, value in tensors.items() if key.startswith("block.")})
        for short, fields in words["codes"].items():
            parts: dict[str, Any] = {key: tensors.get(f"codes.{short}.{key}") for key in ("code", "scale", "zero")}
            found[f"{prefix}{index}.{short}"] = Codes(**parts, **fields)
        about = words["about"]
    return len(blocks), found, about


assert {f.name for f in dataclasses.fields(Codes)} == {"code", "scale", "zero", "bits", "group"}  # all of them are kept
