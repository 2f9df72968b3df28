"""A language model that is only counted: the weakest one that still knows the distribution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["Bigram"]

BATCH = 1 << 20  # pairs that are put together before they are merged into the table


class Bigram:
    """p(b | a) = (c(ab) + t(a) p(b)) / (c(a) + t(a)), p(b) = (c(b) + 1) / (n + v); t(a): how many different tokens follow a.

    Witten-Bell smoothing, so every token has a probability and the tokens of a row sum to 1. c counts pairs within a row,
    ids in [0, v). Memory: 16 bytes for each different pair; cost: one sort of the pairs; a look-up is a binary search.
    """

    def __init__(self, rows: Iterable[Sequence[int]], vocab: int):
        self.vocab = vocab
        self.keys, self.counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
        waiting: list[np.ndarray] = []
        for row in rows:
            ids = np.asarray(row, np.int64)
            waiting.append(ids[:-1] * vocab + ids[1:])
            if sum(map(len, waiting)) > BATCH:
                self._merge(waiting)
                waiting = []
        self._merge(waiting)
        before, after = self.keys // vocab, self.keys % vocab
        self.total = np.bincount(before, self.counts, vocab)  # c(a)
        self.kinds = np.bincount(before, minlength=vocab)  # t(a)
        self.alone = (np.bincount(after, self.counts, vocab) + 1) / (self.counts.sum() + vocab)

    def _merge(self, parts: list[np.ndarray]) -> None:
        found, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]), return_counts=True)
        self.keys, at = np.unique(np.concatenate([self.keys, found]), return_inverse=True)
        self.counts = np.bincount(at, np.concatenate([self.counts, counts]), len(self.keys)).astype(np.int64)

    def log_probabilities(self, row: Sequence[int]) -> np.ndarray:
        """log p(row[i + 1] | row[i]) in nats, float64 [len - 1]."""
        ids = np.asarray(row, np.int64)
        before, after = ids[:-1], ids[1:]
        wanted = before * self.vocab + after
        at = np.minimum(self.keys.searchsorted(wanted), max(len(self.keys) - 1, 0))
        seen = np.where(self.keys[at] == wanted, self.counts[at], 0) if len(self.keys) else np.zeros(len(wanted))
        # a token that was never followed has t = 0: it is followed by anything, as often as it occurs
        kinds = np.maximum(self.kinds[before], 1)
        return np.log((seen + kinds * self.alone[after]) / (self.total[before] + kinds))
