"""Files that are there whole or not at all, and what a disk's refusal is called."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smelt.spec import SmeltError

__all__ = ["disk_errors", "flush", "link_or_copy", "write_json", "write_text"]


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk or a folder that may not be written is one clear line, not a traceback."""
    try:
        yield
    except OSError as error:
        reasons = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up", errno.EROFS: "the folder is read-only"}
        reasons |= {errno.EACCES: "permission denied", errno.EPERM: "permission denied"}
        if error.errno not in reasons:
            raise
        raise SmeltError(
            f"{reasons[error.errno]}; finished stages are kept, run again to go on", file=str(error.filename or ".")
        ) from error
    except Exception as error:  # safetensors and torch wrap the operating system's error in their own
        text = str(error)
        if "No space left on device" in text or ("PytorchStreamWriter" in text and "failed" in text) or "unexpected pos" in text:
            raise SmeltError("the disk is full; finished stages are kept, run again to go on") from error
        raise


def write_json(file: Path, value: Any) -> None:
    write_text(file, json.dumps(value, indent=1))


def write_text(file: Path, text: str) -> None:
    """The whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def flush(folder: Path, deep: bool = True) -> None:
    """Force a folder (and its files) to the disk."""
    paths = [p for p in folder.rglob("*") if p.is_file()] if deep else []
    for path in [*paths, folder]:
        if path.is_dir() and os.name == "nt":
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
