"""Readers of one file: text in blocks, JSON lines, parquet. Each yields (name, text) and names file and line of what is wrong."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from smelt.spec import SmeltError, nearest

__all__ = ["read"]

ROWS = (".jsonl", ".ndjson", ".json")
PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LONGEST_ROW = 1 << 26  # bytes of one JSON line; a longer one is a whole array on one line
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


def read(file: Path, field: str, block: int) -> Iterator[tuple[str, str]]:
    """(name, text) of every document of one file."""
    kind = file.with_suffix("").suffix if file.suffix in PACKED else file.suffix
    try:
        if file.suffix == ".parquet":
            yield from _parquet(file, field)
            return
        with PACKED.get(file.suffix, _plain)(file) as data:
            yield from _rows(file, data, field) if kind in ROWS else _text(file, data, block)
    except UNREADABLE as error:
        raise SmeltError(f"cannot be read: {error}", file=str(file)) from error


def _plain(file: Path) -> BinaryIO:
    return open(file, "rb")


def _text(file: Path, data: BinaryIO, block: int) -> Iterator[tuple[str, str]]:
    rest, number = "", 0
    try:
        with io.TextIOWrapper(data, encoding="utf-8-sig") as lines:
            while chunk := lines.read(block):
                rest += chunk
                while len(rest) > block:
                    cut = rest.rfind("\n", 0, block) + 1 or block
                    yield f"{file}#{number}", rest[:cut]
                    rest, number = rest[cut:], number + 1
    except UnicodeDecodeError:
        raise SmeltError(
            "not UTF-8 text; convert it, or name the text files only, as in files(path='my/**/*.txt')", file=str(file), line=_bad_line(file)
        ) from None
    if rest:
        yield (f"{file}#{number}" if number else str(file)), rest


def _bad_line(file: Path) -> int:
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with PACKED.get(file.suffix, _plain)(file) as data:
        while part := data.read(1 << 16):
            try:
                line += decoder.decode(part).count("\n")
            except UnicodeDecodeError as error:
                return line + error.object[: error.start].count(b"\n")
    return line


def _rows(file: Path, data: BinaryIO, field: str) -> Iterator[tuple[str, str]]:
    line = 0
    while row := data.readline(LONGEST_ROW):
        line += 1
        if row.isspace():
            continue
        try:
            if len(row) == LONGEST_ROW:
                raise ValueError(f"the line is longer than {LONGEST_ROW >> 20} MB")
            value = json.loads(row)
        except (ValueError, RecursionError) as error:
            array = "; a JSON array is not read, write one object per line" if line == 1 and row.lstrip().startswith(b"[") else ""
            said = "nested too deeply" if isinstance(error, RecursionError) else str(error).split(": line")[0]
            raise SmeltError(f"not a JSON object: {said}{array}", file=str(file), line=line) from None
        if not isinstance(value, dict):
            raise SmeltError(f"a JSON object per line is expected, here is a {_kind(value)}", file=str(file), line=line)
        if field not in value:
            raise SmeltError(f"there is no field '{field}'{nearest(field, value)}", file=str(file), line=line)
        text = value[field]
        if text is not None and not isinstance(text, str):
            raise SmeltError(f"the field '{field}' holds a {_kind(text)}, not text", file=str(file), line=line)
        yield f"{file}:{line}", text or ""


def _kind(value: Any) -> str:
    return {dict: "object", list: "list", bool: "truth value", int: "number", float: "number", str: "string"}.get(type(value), "null")


def _parquet(file: Path, field: str) -> Iterator[tuple[str, str]]:
    import pyarrow as pa  # only where there is a parquet file: the import takes longer than a small corpus
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
            if field not in table.schema_arrow.names:
                raise SmeltError(f"there is no column '{field}'{nearest(field, table.schema_arrow.names)}", file=str(file))
            kind = table.schema_arrow.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise SmeltError(f"the column '{field}' holds {kind}, not text", file=str(file))
            row = 0
            for batch in table.iter_batches(batch_size=64, columns=[field], use_threads=False):
                for text in batch.column(0):
                    row += 1
                    yield f"{file}:{row}", text.as_py() or ""
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SmeltError(f"cannot be read as parquet: {str(error).splitlines()[0][:200]}", file=str(file)) from error
