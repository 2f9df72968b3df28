"""Exact duplicates removed from a corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from smelt.data import Corpus, Document, Split
from smelt.data._text import fingerprint
from smelt.spec import Paper

__all__ = ["Dedup"]

ORDER: tuple[Split, ...] = ("test", "validation", "train")  # a text stays in the first split that has it


class Counts(NamedTuple):
    """What became of the documents of one split."""

    kept: int
    within: int  # removed: an earlier document of the same split has the text
    across: int  # removed: test, or validation, has the text


@dataclass(frozen=True)
class Dedup:
    """Keep d_i iff its text differs from that of every earlier document, where test comes before validation before train.

    So no text of the test split is ever trained or tuned on. Two texts are the same when they are equal, or, with
    spaces=False, equal after all whitespace is left out. scope: "within" removes only inside a split, "across" only
    what a held-out split has, "both" (the default) either.

    Memory: 8 bytes per distinct document and as much again while two sorted runs are merged. Texts are compared
    by 64-bit hashes: among n different documents one is wrongly dropped with probability about n^2 / 2^65 (3e-4 for
    1e8). Cost: reading `train` reads the held-out splits first. Near duplicates are not found.

    Differs from the paper: whole documents only (its suffix array finds repeated spans of 50 tokens too).
    """

    paper: ClassVar = Paper("Deduplicating Training Data Makes Language Models Better", "arXiv:2107.06499", "section 4, exact matches")
    corpus: Corpus
    scope: Literal["within", "across", "both"] = "both"
    spaces: bool = True  # does whitespace count

    def documents(self, split: Split) -> Generator[Document, None, Counts]:
        """Streams; the generator's return value is the Counts."""
        held_out, own, kept, within, across = _Seen(), _Seen(), 0, 0, 0
        if self.scope != "within":
            for earlier in ORDER[: ORDER.index(split)]:
                for document in self.corpus.documents(earlier):
                    held_out.add(fingerprint(document.text, spaces=self.spaces))
        for document in self.corpus.documents(split):
            key = fingerprint(document.text, spaces=self.spaces)
            if key in held_out:
                across += 1
            elif self.scope != "across" and not own.add(key):
                within += 1
            else:
                kept += 1
                yield document
        return Counts(kept, within, across)

    def counts(self, split: Split) -> Counts:
        """How many documents of the split are kept and removed. Cost: as reading it."""
        documents = self.documents(split)
        while True:
            try:
                next(documents)
            except StopIteration as end:
                return end.value

    def digest(self) -> str:
        about = f"{self.scope} {self.spaces} {self.corpus.digest()}"
        return "dedup-" + hashlib.sha256(about.encode()).hexdigest()


class _Seen:
    """A set of 64-bit keys in sorted runs of 8 bytes each; each run is more than 4 times as long as the next."""

    RECENT = 1 << 14  # keys held in a Python set (about 100 bytes each) before they become a run

    def __init__(self) -> None:
        self.recent: set[int] = set()
        self.runs: list[np.ndarray] = []

    def __contains__(self, key: int) -> bool:
        if key in self.recent:
            return True
        wanted = np.uint64(key)
        for run in self.runs:
            at = int(run.searchsorted(wanted))
            if at < len(run) and run[at] == wanted:
                return True
        return False

    def add(self, key: int) -> bool:
        """Is it new?"""
        if key in self:
            return False
        self.recent.add(key)
        if len(self.recent) == self.RECENT:
            run = np.fromiter(self.recent, np.uint64, len(self.recent))
            self.recent.clear()
            while self.runs and len(self.runs[-1]) <= 4 * len(run):
                run = np.concatenate([self.runs.pop(), run])
            run.sort()
            self.runs.append(run)
        return True
