"""Text files, JSON lines and parquet tables as a corpus."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, cast

from annotated_types import Ge, Interval

from smelt.data import Document, Split
from smelt.data._read import read
from smelt.data._text import clean, split_of
from smelt.spec import Paper, SmeltError, nearest

__all__ = ["Files"]

SMALL, LARGE = 1 << 12, 1 << 17  # characters of the blocks a long text file is cut into


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
            for name, text in read(file, self.field, block):
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
