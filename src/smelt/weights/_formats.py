"""Write quantized matrices in the one packed format that plain transformers reads back: compressed-tensors
"pack-quantized", for 2 to 8 bits, with and without zero points.

What was measured (transformers 5.23, compressed-tensors 0.20): left to itself, transformers keeps the codes until the
first forward and cannot load zero points at all (their shape mismatches). With `"dequantize": true` in the
quantization_config of config.json every width loads, as ordinary linear modules with dense weights, computed as
scale * (code - zero) in the dtype of the stored scale and then cast to the dtype asked for: no rounding that
`Codes.dequantize` does not do as well. That path reads one scheme for the whole model, so widths cannot be mixed.
The reader needs the package compressed-tensors; smelt itself it does not need.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from smelt.model._files import header
from smelt.model._load import locate
from smelt.spec import SmeltError
from smelt.weights import Codes

__all__ = ["group_of", "pack", "packed_bytes", "refuse_raw_codes", "storage", "uniform"]

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def storage(dtype: torch.dtype) -> torch.dtype:
    """The dtype a scale is stored in: 16 bits always. float16 has three bits more than bfloat16."""
    return torch.bfloat16 if dtype is torch.bfloat16 else torch.float16


def group_of(group: int, columns: Iterable[int], name: str) -> list[int]:
    """Columns that share a scale, per matrix; 0 or -1 is the whole row. Raises SmeltError when `group` divides one of them not."""
    columns = list(columns)
    if group <= 0:
        return columns
    wrong = [n for n in columns if n % group]
    if wrong:
        common = math.gcd(*columns)
        fit = min((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(math.log(d / group)))
        every = "this matrix has" if len(columns) == 1 else "some matrices have"
        raise SmeltError(f"{name}: group={group} does not divide the {wrong[0]} columns {every}; the nearest that fits is group={fit}")
    return [group] * len(columns)


def packed_bytes(codes: Codes) -> int:
    """Bytes of one matrix in the file: codes and zero points in whole 32-bit words, 16-bit scales, two int64 for the shape."""
    rows, columns = codes.code.shape
    groups = columns // codes.group
    zeros = 0 if codes.zero is None else 4 * math.ceil(rows * codes.bits / 32) * groups
    return 4 * rows * math.ceil(columns * codes.bits / 32) + 2 * rows * groups + zeros + 16


def _tensors(name: str, codes: Codes) -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    found = {
        "weight_packed": pack_to_int32(codes.code, codes.bits),
        "weight_scale": codes.scale.contiguous(),
        "weight_shape": torch.tensor(codes.code.shape),
    }
    if codes.zero is not None:
        found["weight_zero_point"] = pack_to_int32(codes.zero, codes.bits, packed_dim=0)
    return {f"{name}.{part}": value for part, value in found.items()}


def _scheme(codes: Mapping[str, Codes]) -> dict[str, Any]:
    """The one scheme of all matrices. Refuses by name what the format, or transformers' reading of it, cannot express."""
    first_name, first = next(iter(codes.items()))
    whole = all(c.group == c.code.shape[1] for c in codes.values())
    for name, c in codes.items():
        if not 2 <= c.bits <= 8:
            raise SmeltError(f"'{name}' has {c.bits} bits; the packed format that transformers loads holds 2 to 8")
        same = c.bits == first.bits and (c.zero is None) == (first.zero is None) and (whole or c.group == first.group)
        if not same:
            raise SmeltError(
                f"'{name}' and '{first_name}' are quantized differently (bits, group or zero points); transformers reads one "
                "scheme for all packed matrices and would decode the others wrong"
            )
        if c.scale.dtype not in (torch.float16, torch.bfloat16):
            raise SmeltError(f"'{name}' has {c.scale.dtype} scales; they are stored in 16 bits, so round them before the weights")
    return {
        "num_bits": first.bits,
        "type": "int",
        "symmetric": first.zero is None,
        "strategy": "channel" if whole else "group",
        "group_size": None if whole else first.group,
        "dynamic": False,
    }


def uniform(codes: Mapping[str, Codes]) -> bool:
    """Whether one scheme describes all of them, so that the packed format can hold them."""
    return len({(c.bits, c.zero is None, c.scale.dtype, c.group) for c in codes.values()}) <= 1 or (
        len({(c.bits, c.zero is None, c.scale.dtype) for c in codes.values()}) == 1
        and all(c.group == c.code.shape[1] for c in codes.values())
    )


def pack(folder: Path, model: nn.Module, codes: Mapping[str, Codes]) -> None:
    """Replace, in a plain checkpoint just written, the matrices in `codes` (full module name -> Codes) by packed ones.

    Each matrix is decoded again from the file by compressed-tensors' own code and must come out as
    `Codes.dequantize`, bit for bit. Memory: one shard. Raises SmeltError for what the format cannot express.
    """
    scheme = _scheme(codes)
    left = {f"{name}.weight" for name in codes}
    where: dict[str, str] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        shard: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as source:
            for key in source.keys():  # noqa: SIM118
                if key in left:
                    left.discard(key)
                    name = key.removesuffix(".weight")
                    shard.update(_tensors(name, codes[name]))
                else:
                    shard[key] = source.get_tensor(key)
        save_file(shard, file.with_suffix(".part"), metadata={"format": "pt"})  # `file` is still mapped: never write into it
        os.replace(file.with_suffix(".part"), file)
        where.update(dict.fromkeys(shard, file.name))
        size += sum(value.nbytes for value in shard.values())
    if left:
        raise SmeltError(f"the checkpoint names its weights otherwise than the model: no '{min(left)}' in it")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, indent=2))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "dequantize": True,
        "ignore": [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in codes],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": scheme}},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    _decodes(folder, codes, where)
    refuse_raw_codes(folder)


def _decodes(folder: Path, codes: Mapping[str, Codes], where: Mapping[str, str]) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    scheme = QuantizationConfig.model_validate(about).config_groups["group_0"]
    reader = BaseCompressor.get_value_from_registry(about["format"])
    for name, c in codes.items():
        with safe_open(folder / where[f"{name}.weight_packed"], "pt") as source:
            stored = {part: source.get_tensor(f"{name}.{part}") for part in PARTS if f"{name}.{part}" in where}
        back = reader.decompress(stored, scheme)["weight"]
        want = c.dequantize().to(back.device)
        if back.shape != want.shape or not torch.equal(back, want):
            raise SmeltError(f"'{name}' reads back from {folder} as another matrix than was measured; compressed-tensors may have changed")


def refuse_raw_codes(folder: Path) -> None:
    """Raise SmeltError when a checkpoint would load codes as if they were weights; reads the headers only.

    transformers reads an integer `weight` without a word and calls scales without a quantization_config
    "unexpected ... can be ignored": the codes, 100 times too large, become the weights.
    """
    locate(str(folder))  # refuses integer weights that no quantization_config explains
    tensors = header(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in tensors:
        owner, _, part = name.rpartition(".")
        if part in PARTS and not config.get("quantization_config"):
            raise SmeltError(f"'{name}' is a part of a quantized matrix, and config.json has no quantization_config to say so")
        if part == "weight_packed" and f"{owner}.weight_scale" not in tensors:
            raise SmeltError(f"'{name}' has codes without their scales")
