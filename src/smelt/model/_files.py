"""What the files of a checkpoint say before any weight is read: JSON, safetensors headers, a digest. Runs nothing."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from smelt.spec import SmeltError

__all__ = ["BYTES", "WEIGHTS", "header", "identity", "read_json", "shown"]

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
LONGEST_JSON, LONGEST_HEADER = 1 << 26, 1 << 24  # bytes; a header of 16 MB names about 100,000 tensors
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def shown(name: object) -> str:
    """In quotes, short, and printable whatever is in it."""
    text = str(name)
    return ascii(text if len(text) <= 200 else text[:197] + "...")


def read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LONGEST_JSON:
            raise ValueError(f"it is longer than {LONGEST_JSON >> 20} MB")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SmeltError(f"not readable as JSON: {error}", file=str(path)) from None
    if not isinstance(value, dict):
        raise SmeltError("a JSON object is expected", file=str(path))
    return value


def header(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """{tensor: (dtype, shape)} from the safetensors headers alone. Refuses truncated and malformed files by name."""
    single = folder / WEIGHTS[0]
    if single.is_file():
        files = [single]
    else:
        index = read_json(folder / WEIGHTS[1])
        shards = index.get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(v, str) for v in shards.values()):
            raise SmeltError("'weight_map' is missing or not a table", file=str(folder / WEIGHTS[1]))
        files = sorted({folder / v for v in shards.values()})
        for file in files:
            if file.parent != folder or not _is_file(file):
                raise SmeltError(f"the shard {shown(file.name)} named in the index is not there", file=str(folder / WEIGHTS[1]))
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for file in files:
        found.update(_read_header(file))
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:
        return False


def _read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    size = file.stat().st_size
    with open(file, "rb") as data:
        first = data.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise SmeltError("not a safetensors file, or cut short", file=str(file))
        raw = data.read(length)
    try:
        table = json.loads(raw)
        tensors = {k: v for k, v in table.items() if k != "__metadata__"}
        found, end = {}, 0
        for name, about in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"][0]):
            start, stop = about["data_offsets"]
            shape = tuple(int(n) for n in about["shape"])
            count = 1
            for n in shape:
                count *= n
            if start != end or stop < start or min(shape, default=0) < 0 or count * BYTES.get(about["dtype"], 1) != stop - start:
                raise ValueError(name)
            found[name], end = (about["dtype"], shape), stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, IndexError, OverflowError):
        raise SmeltError("the safetensors header is malformed", file=str(file)) from None
    if end != size - 8 - length:
        raise SmeltError(f"the file is cut short: {size - 8 - length} bytes of weights where the header promises {end}", file=str(file))
    return found


def identity(folder: Path) -> str:
    """Digest of a checkpoint's files: names, and contents up to 64 MB each, above that size and time."""
    digest = hashlib.sha256()
    for file in sorted(
        p for p in folder.iterdir() if p.is_file() and p.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt", ".bin")
    ):
        about = file.stat()
        digest.update(f"{file.name} {about.st_size}\n".encode())
        digest.update(file.read_bytes() if about.st_size <= 64 << 20 else str(about.st_mtime_ns).encode())
    return digest.hexdigest()
