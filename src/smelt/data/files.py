"""Text files, JSON lines and parquet tables as a corpus."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, ClassVar, cast

from annotated_types import Ge, Interval

from smelt.data import Document, Split
from smelt.data._text import clean, split_of
from smelt.spec import Paper, SmeltError, nearest

__all__ = ["Files"]

ROWS = (".jsonl", ".ndjson", ".json")
PACKED: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
LONGEST_ROW = 1 << 26  # bytes of one JSON line; a longer one is a whole array on one line
SMALL, LARGE = 1 << 12, 1 << 17  # characters of the blocks a long text file is cut into
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class Files:
    """split(d) = test if h < test, validation if h < test + validation, else train; h = hash(d without whitespace) in [0, 1).

    `path` is a file, a folder (everything in it) or a glob (`**` goes into folders). `.jsonl`, `.ndjson` and `.parquet`
    hold one document per row, in the column `field`; every other file is UTF-8 text (source code, Markdown) and one
    document. All but parquet may be packed with gzip, bzip2 or xz. Rows without text are skipped.

    A text file longer than `block` characters is cut at line ends into documents of that length, each with a split
    of its own, so that one long book has held-out parts too. block = 0 chooses total bytes / 256, rounded down to a
    power of two within [4,096, 131,072]. `validation` and `test` are shares, or globs of files that are held out as
    they are. Shares go by content, so copies of a document (up to whitespace) never cross; with globs, and for
    copies inside one split, wrap it: dedup(corpus=files(...)).

    Cost: one pass over all files for each split; memory: one block or row (at most 64 MB for a JSON line), and one
    batch of 64 rows of a parquet file. Raises SmeltError with file and line for text that is not UTF-8 and for
    malformed rows; a field that is not there names the nearest.
    """

    paper: ClassVar = Paper("JSON Lines", "https://jsonlines.org", "one JSON value per line, UTF-8")
    path: str
    field: str = "text"
    validation: Annotated[float, Interval(ge=0, lt=1)] | str = 0.04
    test: Annotated[float, Interval(ge=0, lt=1)] | str = 0.04
    block: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        if sum(self._shares()) >= 1:
            raise SmeltError(f"files: validation={self.validation} and test={self.test} leave nothing to train on")

    def documents(self, split: Split) -> Iterator[Document]:
        listing = self._listing()
        block = self.block or _block(sum(_size(file) for file, _ in listing))
        validation, test = self._shares()
        for file, fixed in listing:
            if fixed not in (None, split):
                continue
            for name, text in _read(file, self.field, block):
                if text.strip() and (fixed or split_of(text, validation, test)) == split:
                    yield Document(name, clean(text))

    def rows_of_pairs(self) -> list[Path]:
        """Its .jsonl files, for preference pairs."""
        return [file for file, _ in self._listing() if file.suffix in (".jsonl", ".ndjson")]

    def digest(self) -> str:
        about = [repr(self)]
        for file, fixed in self._listing():
            state = file.stat()
            about.append(f"{file} {fixed} {state.st_size} {state.st_mtime_ns}")
        return "files-" + hashlib.sha256("\n".join(about).encode("utf-8", "surrogateescape")).hexdigest()

    def _shares(self) -> tuple[float, float]:
        return tuple(0.0 if isinstance(share, str) else share for share in (self.validation, self.test))  # type: ignore[return-value]

    def _listing(self) -> list[tuple[Path, Split | None]]:
        """All files, sorted, with the split of those that a glob holds out."""
        fixed: dict[Path, Split] = {}
        for name, pattern in (("validation", self.validation), ("test", self.test)):
            if isinstance(pattern, str):
                fixed.update(dict.fromkeys(_found(pattern), cast(Split, name)))
        return [(file, fixed.get(file)) for file in sorted({*_found(self.path), *fixed})]


def _found(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        names = glob.glob(f"{glob.escape(str(path))}/**", recursive=True)
    else:
        names = [str(path)] if path.is_file() else glob.glob(str(path), recursive=True)
    files = [Path(name) for name in names if os.path.isfile(name)]
    if not files:
        beside = [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        raise SmeltError(f"files: no file matches '{pattern}' (in {Path.cwd()}){nearest(str(path), beside)}")
    return files


def _size(file: Path) -> int:
    return file.stat().st_size


def _block(total: int) -> int:
    return min(LARGE, max(SMALL, 1 << max(0, (total // 256).bit_length() - 1)))


def _read(file: Path, field: str, block: int) -> Iterator[tuple[str, str]]:
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
