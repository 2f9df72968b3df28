"""The Python standard library of the running interpreter as a corpus."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from smelt.data import Document, Split
from smelt.spec import Paper, SmeltError, nearest

__all__ = ["Stdlib"]

SKIP = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


@dataclass(frozen=True)
class Stdlib:
    """split(m) = test if h < 6, validation if h < 9, else train; h = sha256("stdlib" + m) mod 100.

    m is the top-level module or package, so no file of a held-out package is ever trained on, and a module
    keeps its split in every Python version. About 10 MB of real code on Python 3.11. Left out: the tests, and
    `encodings` and `pydoc_data`, which are tables and not code. A file whose exact text occurs in an earlier
    split (test, validation, train in this order) is dropped.

    `packages`: the train split has only these modules and packages of the top level, as for trainings on partitions that
    are compared with each other; the held-out splits stay whole, so all are measured on the same text. None: all.

    Raises SmeltError for a package that is not there and for one that is held out.

    Needs no download; the text is that of the running interpreter, so figures are comparable only under the
    same Python version (it is part of the digest).
    """

    paper: ClassVar = Paper("The Python Standard Library", "https://docs.python.org/3/library/", "source files")
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.packages:
            return
        root = Path(sysconfig.get_path("stdlib"))
        top = {
            path.name.removesuffix(".py") for path in root.iterdir() if path.name not in SKIP and (path.is_dir() or path.suffix == ".py")
        }
        for name in self.packages:
            if name not in top:
                raise SmeltError(f"stdlib: no module or package '{name}'{nearest(name, top)}")
            if _split(name) != "train":
                raise SmeltError(f"stdlib: '{name}' is in the {_split(name)} split, so it is never trained on; name another package")

    def documents(self, split: Split) -> Iterator[Document]:
        root, seen = Path(sysconfig.get_path("stdlib")), set()
        order = {"test": 0, "validation": 1, "train": 2}
        for path in sorted(self._files(root), key=lambda p: (order[_split(p.parts[0])], p.as_posix())):
            if order[_split(path.parts[0])] > order[split]:
                break
            text = (root / path).read_text(encoding="utf-8", errors="replace")
            key = hashlib.sha256(text.encode()).digest()
            if key in seen or not text.strip():
                continue
            seen.add(key)
            chosen = split != "train" or not self.packages or path.parts[0].removesuffix(".py") in self.packages
            if _split(path.parts[0]) == split and chosen:
                yield Document(path.as_posix(), text)

    def digest(self) -> str:
        version = f"stdlib-{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
        return "-".join([version, *sorted(set(self.packages))])

    @staticmethod
    def _files(root: Path) -> Iterator[Path]:
        for folder, folders, files in os.walk(root):
            folders[:] = sorted(f for f in folders if f not in SKIP)
            yield from (Path(folder, f).relative_to(root) for f in files if f.endswith(".py") and not f.startswith("_sysconfigdata"))


def _split(part: str) -> Split:
    bucket = int(hashlib.sha256(("stdlib" + part.removesuffix(".py")).encode()).hexdigest(), 16) % 100
    return "test" if bucket < 6 else "validation" if bucket < 9 else "train"
