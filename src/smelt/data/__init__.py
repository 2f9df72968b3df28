"""Corpora and what is chosen from them.

A corpus yields documents of one split; a selection is a corpus that holds another corpus (`dedup(corpus=stdlib())`),
so choosing, mixing and cleaning compose without further syntax. Nothing here looks at a test split while it
chooses. Files, globs and `datasets` names are written as plain text in a recipe (`data: my/*.jsonl`) and
become the corpus `files`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, runtime_checkable

__all__ = ["SPLITS", "Corpus", "Document", "Lists", "PairFiles", "Split"]

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class Document(NamedTuple):
    name: str  # stable and unique in its corpus: a module path, `file.jsonl:12`
    text: str


@runtime_checkable
class Corpus(Protocol):
    """Streams documents; the same call yields the same documents in the same order. Cost: one pass, O(1) memory."""

    def documents(self, split: Split) -> Iterator[Document]: ...

    def digest(self) -> str:
        """Changes whenever the text may have changed (settings, file sizes and times, versions); reads no text."""
        ...


@runtime_checkable
class PairFiles(Protocol):
    """A corpus that can also say which of its files hold preference pairs, one {prompt, chosen, rejected} per row."""

    def rows_of_pairs(self) -> list[Path]: ...


@runtime_checkable
class Lists(Protocol):
    """A corpus that also has lists to learn ranking from: (query, passages, grades), passages in falling order of grade."""

    def lists(self, split: Split) -> Iterator[tuple[str, list[str], list[float]]]: ...
