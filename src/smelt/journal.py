"""Answers that must not be asked for twice: one file of JSON lines that outlives a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from smelt.spec import SmeltError

__all__ = ["Journal"]


class Journal:
    """A dictionary on disk to which is only added: `key in journal`, `journal[key]`, `journal.put(key, value)`.

    Every entry is one line {"key", "value"}, on the disk before `put` returns; a line that a kill cut short is dropped and
    overwritten. A key is put once. Values are what JSON can hold. One process writes. Memory: all values.
    """

    def __init__(self, file: Path):
        self.file, self.values = file, {}
        whole = 0
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "ab+") as lines:
                lines.seek(0)
                for line in lines:
                    if not line.endswith(b"\n"):
                        break
                    try:
                        entry = json.loads(line)
                        self.values[entry["key"]] = entry["value"]
                    except (ValueError, KeyError, TypeError):
                        raise SmeltError("a damaged journal; delete it to ask again", file=str(file)) from None
                    whole += len(line)
                lines.truncate(whole)
            self.size = whole
        except OSError as error:
            raise SmeltError(f"the journal cannot be written: {error.strerror}", file=str(file)) from error

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def __len__(self) -> int:
        return len(self.values)

    def put(self, key: str, value: Any) -> None:
        if key in self.values:
            raise SmeltError(f"'{key}' is in the journal already", file=str(self.file))
        line = (json.dumps({"key": key, "value": value}) + "\n").encode()
        try:
            with open(self.file, "r+b") as lines:
                lines.seek(self.size)
                lines.truncate()  # what a full disk left of a line before
                lines.write(line)
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            raise SmeltError(f"the journal cannot be written: {error.strerror}", file=str(self.file)) from error
        self.values[key] = value
        self.size += len(line)
