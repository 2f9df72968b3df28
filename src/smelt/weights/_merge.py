"""Merge models of one architecture: the contract of merging methods, what they share, and the merger of folders.

Folders are read and written tensor by tensor: every shard's header is known before any weight is, so each merged
tensor goes straight to its place in the file. Memory: one tensor of every model, and what the method makes of them.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from smelt.model._files import BYTES, WEIGHTS, header
from smelt.model._load import FLOATS, TOKENIZERS, is_decoder, locate, same_tokenizer
from smelt.progress import Track, track
from smelt.spec import SmeltError

__all__ = ["Merge", "affine", "largest", "merge_folders", "together", "wide"]

SHARD = 4 << 30  # bytes of a file
# Keys of a configuration that do not change what the weights mean.
FREE = {"_name_or_path", "architectures", "transformers_version", "dtype", "use_cache", "max_position_embeddings", "initializer_range"}
FREE |= {"id2label", "label2id", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "problem_type", "pretraining_tp"}
# Files taken from the first model as they are: read and saved again, some tokenizers come out as others.
KEPT = ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"]
KEPT += ["chat_template.jinja", "chat_template.json", *TOKENIZERS]
Header = dict[str, tuple[str, tuple[int, ...]]]


class Merge(ABC):
    """(name, one tensor of every model, that of the base) -> tensor with the shape and dtype of the first.

    The first tensor is that of the stage's own model, the others follow `models`: folders, hub ids, `base`, or earlier
    variants of the recipe. `base` is what task vectors are taken from. Nothing given is changed in place; the arithmetic
    is float32 (float64 for float64); models that all equal the base give the base, bit for bit.
    """

    needs_base: ClassVar[bool] = False

    @property
    @abstractmethod
    def models(self) -> tuple[str, ...]: ...

    @property
    def base(self) -> str:
        return ""  # no task vectors

    @abstractmethod
    def __call__(self, name: str, tensors: Sequence[Tensor], base: Tensor | None = None) -> Tensor: ...


def together(method: Merge, tensors: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    """The tensors, after the base where the method needs one. Raises SmeltError for a wrong number of them or other shapes."""
    who = type(method).__name__
    if len(tensors) != 1 + len(method.models):
        raise SmeltError(f"{who} merges {1 + len(method.models)} models (its own and {list(method.models)}); {len(tensors)} were given")
    if method.needs_base and base is None:
        raise SmeltError(f"{who} needs the base that its models were trained from")
    found = [base, *tensors] if method.needs_base and base is not None else list(tensors)
    for tensor in found:
        if tensor.shape != tensors[0].shape:
            raise SmeltError(f"{who}: shapes {list(tensors[0].shape)} and {list(tensor.shape)} cannot be merged")
    return found


def wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def affine(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i for weights that sum to 1, around the tensor with the largest weight.

    Written t_p + sum_i w_i (t_i - t_p) it is exact for equal tensors and where one weight is 1, whatever the rounding.
    """
    at = max(range(len(weights)), key=lambda i: abs(weights[i]))
    pivot = wide(tensors[at])
    result = pivot.clone()
    for index, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if index != at and weight != 0.0:
            result.add_(wide(tensor) - pivot, alpha=weight)
    return result


def largest(values: Tensor, share: float) -> Tensor:
    """Mask of the round(share * n) entries of largest magnitude that are not zero; ties go to the first in memory order."""
    sizes = values.abs().flatten()
    keep = round(share * sizes.numel())
    if keep == sizes.numel():
        return values != 0
    flat = sizes.cpu().numpy()
    limit = float(np.partition(flat, len(flat) - keep)[len(flat) - keep]) if keep else math.inf  # a sort would index with 8 bytes each
    mask = sizes > limit
    if 0 < limit < math.inf:
        ties = (sizes == limit).nonzero()[:, 0]
        mask[ties[: keep - int(mask.sum())]] = True
    return mask.view_as(values)


# ---------------------------------------------------------------------- folders


class _Source(NamedTuple):
    """A checkpoint that is read one tensor at a time."""

    folder: Path
    config: Any
    tensors: Header
    files: dict[str, Path]

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as file:  # opened anew, so that pages already read are given back
            return file.get_tensor(name)


def merge_folders(
    method: Merge,
    folders: Sequence[Path],
    base_folder: Path | None,
    out: Path,
    *,
    shard_bytes: int = SHARD,
    progress: str | None = "merge",
) -> dict[str, Any]:
    """Merge checkpoints into the new folder `out`, and say what was done, ready for JSON.

    The first folder gives configuration, tokenizer and dtypes. `out` appears whole or not at all. Raises SmeltError for
    models that do not belong together (shapes, names, configuration, tokenizer), quantized ones, and results that are
    not finite.
    """
    if len(folders) != 1 + len(method.models) or (method.needs_base and base_folder is None):
        need = f"{1 + len(method.models)} models" + (" and the base they were trained from" if method.needs_base else "")
        raise SmeltError(f"{type(method).__name__} merges {need}; {len(folders)} {'and a base ' if base_folder else ''}were given")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SmeltError(f"{out} exists already; a merge goes into a new folder")
    sources = [_opened(Path(f)) for f in [*folders, *([base_folder] if method.needs_base and base_folder is not None else [])]]
    _belong(sources)
    first = sources[0]
    part = out.with_name(f".{out.name}.{os.getpid()}")
    shards = _shards(first.tensors, shard_bytes)
    square = norm = 0.0
    bar = track(progress, len(first.tensors), "tensors") if progress else nullcontext(Track("", 0, "tensors"))

    def merged(name: str) -> Tensor:
        nonlocal square, norm
        result, change, size = _one(method, name, sources)
        square, norm = square + change, norm + size
        shown.advance(1)
        return result

    try:
        part.mkdir(parents=True)
        for file in KEPT:
            if (first.folder / file).is_file():
                shutil.copyfile(first.folder / file, part / file)
        with bar as shown:
            for file, plan in shards.items():
                _write(part / file, plan, merged)
        if len(shards) > 1:
            where = {name: file for file, plan in shards.items() for name in plan}
            total = sum(_size(about) for about in first.tensors.values())
            (part / WEIGHTS[1]).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2))
        os.replace(part, out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {
        "kind": "merge",
        "tensors": len(first.tensors),
        "shards": len(shards),
        "relative_change": math.sqrt(square / norm) if norm else 0.0,
    }


def _one(method: Merge, name: str, sources: Sequence[_Source]) -> tuple[Tensor, float, float]:
    """(merged tensor, squared norm of its change, squared norm of the first)."""
    tensors = [source.read(name) for source in sources]
    first = tensors[0]
    if not first.is_floating_point():
        if not all(torch.equal(first, other) for other in tensors[1:]):
            raise SmeltError(f"'{name}' holds whole numbers that differ between the models; they cannot be merged")
        return first, 0.0, 0.0
    base = tensors.pop() if method.needs_base else None
    result = method(name, tensors, base)
    if result.shape != first.shape or result.dtype != first.dtype or not torch.isfinite(result).all():
        raise SmeltError(f"{type(method).__name__}: '{name}' came out with another shape or dtype, or values that are not finite")
    change, size = (torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item() for x in (result - first, first))
    return result, change**2, size**2


def _opened(folder: Path) -> _Source:
    folder = locate(str(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SmeltError(f"{folder}: config.json cannot be read: {type(error).__name__}") from error
    tensors = header(folder)
    odd = [name for name, (kind, _) in tensors.items() if kind not in FLOATS and kind.startswith("F")]  # 8 bits and less
    if config.to_dict().get("quantization_config") is not None or odd:
        raise SmeltError(f"{folder} is quantized; merge the models it was made from, then quantize")
    with torch.device("meta"):
        tied = (AutoModelForCausalLM if is_decoder(config) else AutoModel).from_config(config).all_tied_weights_keys
    kept = {name: about for name, about in tensors.items() if tied.get(name) not in tensors}  # tied weights are merged once
    if (folder / WEIGHTS[0]).is_file():
        return _Source(folder, config, kept, dict.fromkeys(kept, folder / WEIGHTS[0]))
    where = json.loads((folder / WEIGHTS[1]).read_text(encoding="utf-8"))["weight_map"]
    return _Source(folder, config, kept, {name: folder / where[name] for name in kept})


def _belong(sources: Sequence[_Source]) -> None:
    """Refuse models that do not belong together, naming the first thing that differs."""
    first = sources[0]
    ours, settings = _tokenizer(first.folder), first.config.to_dict()
    for other in sources[1:]:
        for key, value in _differing(settings, other.config.to_dict()):
            raise SmeltError(f"{other.folder} has {key}={value}, {first.folder} has {key}={settings.get(key)}; they cannot be merged")
        for name in sorted(first.tensors.keys() ^ other.tensors.keys()):
            has, lacks = (first, other) if name in first.tensors else (other, first)
            raise SmeltError(f"{has.folder} has the weight '{name}', {lacks.folder} has not; models of one architecture are merged")
        for name, (_, shape) in first.tensors.items():
            if shape != (theirs := other.tensors[name][1]):
                raise SmeltError(
                    f"'{name}' is {list(shape)} in {first.folder}, but {list(theirs)} in {other.folder}; they cannot be merged"
                )
        if not same_tokenizer(ours, _tokenizer(other.folder)):
            raise SmeltError(f"{other.folder} has another tokenizer than {first.folder}; their embeddings mean different tokens")


def _tokenizer(folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizer's own library raises what it likes
        raise SmeltError(f"{folder}: there is no tokenizer that can be read ({type(error).__name__})") from error


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from (
        (key, b.get(key)) for key in sorted((a.keys() | b.keys()) - FREE, key=lambda k: (k != "model_type", k)) if a.get(key) != b.get(key)
    )


def _size(about: tuple[str, tuple[int, ...]]) -> int:
    return BYTES.get(about[0], 1) * math.prod(about[1])


def _shards(tensors: Header, most: int) -> dict[str, Header]:
    """{file: its tensors}, in the order of the first model; a tensor larger than `most` has a file of its own."""
    parts: list[Header] = [{}]
    room = most
    for name, about in tensors.items():
        if parts[-1] and _size(about) > room:
            parts.append({})
            room = most
        parts[-1][name] = about
        room -= _size(about)
    if len(parts) == 1:
        return {WEIGHTS[0]: parts[0]}
    return {f"model-{at:05}-of-{len(parts):05}.safetensors": part for at, part in enumerate(parts, 1)}


def _write(file: Path, plan: Header, make: Callable[[str], Tensor]) -> None:
    """A safetensors file whose tensors are made one by one as they are written."""
    order = sorted(plan, key=lambda name: -BYTES.get(plan[name][0], 1))  # wide types first, so that all stay aligned
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + _size(plan[name])
        table[name] = {"dtype": plan[name][0], "shape": plan[name][1], "data_offsets": [start, end]}
    raw = json.dumps(table).encode()
    raw += b" " * (-len(raw) % 8)
    with open(file, "wb") as data:
        data.write(struct.pack("<Q", len(raw)) + raw)
        for name in order:
            data.write(make(name).cpu().reshape(-1).view(torch.uint8).numpy().data)
        data.flush()
        os.fsync(data.fileno())
