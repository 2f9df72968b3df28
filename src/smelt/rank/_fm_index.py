"""Which n-grams of tokens occur in a corpus, where, and what may come next; how a model writes some; what documents are worth by them.

An FM-index over the reversed text: a range [lo, hi) of the sorted suffixes stands for an n-gram, and one token more on
its right is one step of a backward search. Symbols are 0 (the end, once), 1 (after every document), token + 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache

from smelt.spec import SmeltError

__all__ = ["FMIndex", "Key", "Ngram", "beam_search", "intersective", "largest", "odds"]

ALMOST = 1 - 1e-10
SMOOTH = 5.0  # added to the counts of n-grams
Ngram = tuple[int, ...]


class FMIndex:
    """Cost: log2 of the longest repetition sorts to build (2.7 s for 333,000 tokens), 28 bytes a token; a step is one binary
    search a token, whatever the corpus. Documents may be empty."""

    def __init__(self, documents: Sequence[Sequence[int]]):
        sizes = np.array([len(d) for d in documents], dtype=np.int64)
        self.starts = np.cumsum(sizes + 1) - sizes - 1  # of each document in `text`
        self.text = np.array([token for d in documents for token in [*d, -1]], dtype=np.int64)  # -1 after each document
        self.documents, self.tokens = len(documents), int(sizes.sum())
        reverse = np.concatenate([self.text[::-1] + 2, [0]])
        self.size = len(reverse)
        self.suffixes = _suffixes(reverse)
        self.before = reverse[self.suffixes - 1]  # the symbol before each suffix, in their order (BWT)
        rows = np.argsort(self.before, kind="stable")
        self.steps = self.before[rows] * (self.size + 1) + rows  # (symbol, row) as one rising number

    def extend(self, lo: np.ndarray, hi: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The ranges of the n-grams with one token more each; empty (lo = hi) where that does not occur."""
        base = (tokens + 2) * (self.size + 1)
        return np.searchsorted(self.steps, base + lo), np.searchsorted(self.steps, base + hi)

    def range(self, ngram: Sequence[int]) -> tuple[int, int]:
        lo, hi = np.zeros(1, np.int64), np.full(1, self.size)
        for token in ngram:
            lo, hi = self.extend(lo, hi, np.array([token]))
        return int(lo[0]), int(hi[0])

    def continuations(self, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(which range, token, its lo, its hi) of all tokens that follow, rising; the end of a document is none."""
        size = hi - lo
        which = np.repeat(np.arange(len(lo)), size)
        symbols = self.before[np.arange(size.sum()) + np.repeat(lo - np.cumsum(size) + size, size)]
        top = int(self.before.max()) + 1
        pairs = np.unique((which * top + symbols)[symbols > 1])
        which, tokens = pairs // top, pairs % top - 2
        return which, tokens, *self.extend(lo[which], hi[which], tokens)

    def places(self, lo: int, hi: int, length: int) -> np.ndarray:
        """Where in `text` the n-gram of a range begins, rising."""
        return np.sort(self.size - 1 - length - self.suffixes[lo:hi])

    def of(self, places: np.ndarray) -> np.ndarray:
        """The document of each place in `text`."""
        return np.searchsorted(self.starts, places, "right") - 1


class Key(NamedTuple):
    tokens: Ngram
    weight: float  # above zero
    lo: int
    hi: int


def odds(said: float, count: int, tokens: int) -> float:
    """max(0, logit p(n | q) - logit p(n)) of log p(n | q) and the n-gram's count in a corpus of so many tokens."""
    often, likely = min((count + SMOOTH) / (tokens + SMOOTH), ALMOST), min(math.exp(said), ALMOST)
    return max(0.0, said - math.log1p(-likely) - math.log(often) + math.log1p(-often))


@torch.no_grad()
def beam_search(
    indexes: Sequence[FMIndex], prompts: Sequence[Sequence[int]], model: Any, beams: int, length: int
) -> list[tuple[dict[Ngram, float], np.ndarray]]:
    """Of each prompt {n-gram: log p after the prompt}, every prefix that was ever among the best `beams`, and log p [vocabulary]
    of the first token. Only n-grams that occur in the prompt's index; the mask does not renormalise. `model` is the
    transformers model: one prefill, prompts padded on the left, then `length` - 1 steps; rows of the cache are beams.
    """
    width, device = max(map(len, prompts)), model.device
    ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    cache: Any = DynamicCache(config=model.config)
    first = np.zeros(0)
    found: list[dict[Ngram, float]] = [{} for _ in prompts]
    ngrams: list[Ngram] = [() for _ in prompts]
    owner, said = np.arange(len(prompts)), np.zeros(len(prompts))
    lo, hi = np.zeros(len(prompts), np.int64), np.array([index.size for index in indexes])
    for step in range(length):
        at = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        options = {"attention_mask": mask, "position_ids": at, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=ids, **options).logits[:, -1].double()
        if not torch.isfinite(logits).all():
            raise SmeltError("seal: the model's logits are not finite")
        chance = logits.log_softmax(-1).cpu().numpy()
        first = chance if step == 0 else first
        kept = []
        for q, index in enumerate(indexes):
            rows = np.flatnonzero(owner == q)
            which, tokens, low, high = index.continuations(lo[rows], hi[rows])
            total = said[rows[which]] + chance[rows[which], tokens]
            best = np.argsort(-total, kind="stable")[:beams]
            kept.append((rows[which[best]], tokens[best], low[best], high[best], total[best]))
        parents, tokens, lo, hi, said = (np.concatenate(parts) for parts in zip(*kept, strict=True))
        owner, ngrams = owner[parents], [(*ngrams[p], int(t)) for p, t in zip(parents, tokens, strict=True)]
        for q, ngram, value in zip(owner, ngrams, said, strict=True):
            found[q][ngram] = float(value)
        if not len(parents) or step == length - 1:
            break
        moved = torch.from_numpy(parents).to(device)
        cache.reorder_cache(moved)
        ids = torch.from_numpy(tokens).to(device)[:, None]
        mask = torch.cat([mask[moved], torch.ones_like(ids)], 1)
    return list(zip(found, first, strict=True))


def largest(index: FMIndex, keys: Sequence[Key]) -> np.ndarray:
    """[documents] float64: the weight of the heaviest key in each, 0 without one."""
    score = np.zeros(index.documents)
    for key in sorted(keys, key=lambda k: k.weight):
        score[index.of(index.places(key.lo, key.hi, len(key.tokens)))] = key.weight
    return score


def intersective(
    index: FMIndex, keys: Sequence[Key], single: np.ndarray, alpha: float, beta: float, rare: int = 1500, full: int = 1500
) -> np.ndarray:
    """[documents] float64: sum over keys in a document of weight^alpha cover, heaviest first, places taken once.

    cover = 1 - beta + beta |types of the key that no key before had| / |its types|. A key counts once a document, if it
    occurs on free places; all of these that do not overlap, from the left, are taken. Types on places still free then
    add `single` [token] (0 beyond its end) by the same cover. With more than `full` documents only those are scored
    that are best by keys of at most `rare` occurrences alone; the others are 0.
    """
    keys = sorted(keys, key=lambda k: (-k.weight, k.tokens))
    member = np.ones(index.documents, dtype=bool)
    if index.documents > full:
        first = _sum(index, [k for k in keys if k.hi - k.lo <= rare], single[:0], alpha, beta, member)
        member[np.argsort(-first, kind="stable")[full:]] = False
        member &= first > 0
    return _sum(index, keys, single, alpha, beta, member)


def _sum(index: FMIndex, keys: Sequence[Key], single: np.ndarray, alpha: float, beta: float, member: np.ndarray) -> np.ndarray:
    types = np.unique([token for key in keys for token in key.tokens]).astype(np.int64)
    row, score = np.cumsum(member) - 1, np.zeros(index.documents)
    used, taken = np.zeros((int(member.sum()), len(types)), dtype=bool), index.text < 0
    for key in keys:
        length = len(key.tokens)
        at = index.places(key.lo, key.hi, length)
        at = at[member[index.of(at)]]
        at = _apart(at[~taken[at[:, None] + np.arange(length)].any(1)], length)
        taken[at[:, None] + np.arange(length)] = True
        found, own = np.unique(index.of(at)), np.searchsorted(types, sorted(set(key.tokens)))
        cells = np.ix_(row[found], own)
        score[found] += key.weight**alpha * (1 - beta + beta * (~used[cells]).mean(1))
        used[cells] = True
    worth = np.zeros(int(index.text.max(initial=0)) + 1)
    worth[: len(single)] = single[: len(worth)]
    at = np.flatnonzero(~taken & (worth[index.text] > 0))
    document = index.of(at)
    inside = member[document]
    pairs = np.unique(document[inside] * len(worth) + index.text[at[inside]])
    document, token = pairs // len(worth), pairs % len(worth)
    if len(pairs):
        place = np.searchsorted(types, token).clip(max=max(0, len(types) - 1))
        known = (types[place] == token) & used[row[document], place] if len(types) else np.zeros(len(token), dtype=bool)
        np.add.at(score, document, worth[token] * np.where(known, 1 - beta, 1.0))
    return score


def _apart(at: np.ndarray, length: int) -> np.ndarray:
    """Rising places, those left out that begin inside the one before them that stays."""
    if not (np.diff(at) < length).any():
        return at
    kept, end = [], -1
    for place in at.tolist():
        if place >= end:
            kept.append(place)
            end = place + length
    return np.array(kept, dtype=np.int64)


def _suffixes(text: np.ndarray) -> np.ndarray:
    """The order of all suffixes, by prefix doubling; the last symbol is the smallest and alone."""
    n, step = len(text), 1
    rank = np.unique(text, return_inverse=True)[1].astype(np.int64)
    while True:
        second = np.zeros(n, dtype=np.int64)
        second[:-step] = rank[step:] + 1
        key = rank * (n + 1) + second
        order = np.argsort(key, kind="stable")
        changes = np.diff(key[order]) > 0
        rank[order] = np.concatenate([[0], np.cumsum(changes)])
        if changes.all():
            return order
        step *= 2
