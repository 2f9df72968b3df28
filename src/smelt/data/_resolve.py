"""What a person writes after `data:` becomes a corpus."""

from __future__ import annotations

import glob
import re
from pathlib import Path
from typing import Any

from smelt import registry
from smelt.data import Corpus
from smelt.spec import SmeltError, nearest

__all__ = ["corpus"]

CALL = re.compile(r"\s*(data\.)?\w+\s*\(.*\)\s*", re.DOTALL)
SUFFIXES = {".txt", ".md", ".rst", ".py", ".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".gz", ".bz2", ".xz"}
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


def corpus(text: Any) -> Corpus:
    """A corpus from recipe text: a method, else a path, folder or glob on this machine, else owner/name on the hub.

    `stdlib`, `dedup(corpus=files(path="my/*.txt"))`, `my/*.jsonl`, `owner/name`. A file that has the name of a method
    is written `./name`. Reads no text and asks no network. Raises SmeltError that says what was looked for.
    """
    if not isinstance(text, str):
        return _checked(text, repr(text))
    text = text.strip()
    if CALL.fullmatch(text) or text.removeprefix("data.") in registry.names("data"):
        return _checked(registry.parse(text, "data"), text)
    path = Path(text).expanduser()
    if (text and path.exists()) or (any(mark in text for mark in "*?[") and glob.glob(str(path), recursive=True)):
        saved = any((path / mark).is_file() for mark in ("state.json", "dataset_dict.json"))  # written by save_to_disk
        return registry.load("data", "hub")(name=text) if saved else registry.load("data", "files")(path=text)
    if HUB.fullmatch(text) and not path.parent.is_dir() and path.suffix not in SUFFIXES:
        return registry.load("data", "hub")(name=text)
    looks = "/" in text or "\\" in text or any(mark in text for mark in "*?[") or path.suffix in SUFFIXES
    if looks:
        beside = [str(path.parent / other.name) for other in path.parent.iterdir()] if path.parent.is_dir() else []
        hub = f'; for the dataset on the hub write hub(name="{text}")' if HUB.fullmatch(text) else ""
        raise SmeltError(f"data: no file matches '{text}' (in {Path.cwd()}){nearest(str(path), beside)}{hub}")
    raise SmeltError(
        f"data: '{text}' is neither a corpus, nor a file or folder here, nor owner/name{nearest(text, registry.names('data'))}"
    )


def _checked(value: Any, shown: str) -> Corpus:
    if isinstance(value, type) or not isinstance(value, Corpus):
        raise SmeltError(f"data: {shown} is not a corpus{nearest('', registry.names('data'))}")
    registry.check(value)
    return value
