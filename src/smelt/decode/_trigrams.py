"""Counted trigrams: the successors of a pair of tokens in a corpus, and under them what one text taught."""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from smelt.spec import SmeltError

__all__ = ["KEPT", "Successors", "Trigrams", "counted"]

KEPT = 12  # successors of a pair
BATCH = 64  # documents tokenized at once
Successors = tuple[tuple[int, ...], tuple[float, ...]]  # tokens and weights, largest weight first
NONE: Successors = ((), ())
_counts: WeakKeyDictionary[Any, dict[tuple, dict[int, Successors]]] = WeakKeyDictionary()  # by tokenizer, for the next bind


def counted(data: Any, tokenizer: Any, limit: int, vocab: int) -> dict[int, Successors]:
    """{a * vocab + b: the most frequent c of the corpus and their P}; equal ones by token."""
    if tokenizer is None:
        raise SmeltError("aded: counting a corpus needs the model's tokenizer")
    known, key = _counts.setdefault(tokenizer, {}), (repr(data), data.digest(), limit, vocab)
    if key in known:
        return known[key]
    parts, left, documents = [np.zeros(0, np.int64)], limit, iter(data.documents("train"))
    while left > 0 and (batch := [d.text.encode("utf-8", "replace").decode() for d in itertools.islice(documents, BATCH)]):
        for row in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            ids = np.asarray(row[: max(0, left)], np.int64)
            if len(ids) and ids.max() >= vocab:
                raise SmeltError(f"aded: the tokenizer has the id {ids.max()}, and the model only {vocab} tokens")
            parts.append((ids[:-2] * vocab + ids[1:-1]) * vocab + ids[2:])
            left -= len(ids)
    triples, counts = np.unique(np.concatenate(parts), return_counts=True)
    pairs, first, sizes = np.unique(triples // vocab, return_index=True, return_counts=True)
    share = counts / np.repeat(np.bincount(np.repeat(np.arange(len(pairs)), sizes), counts), sizes)
    best = np.lexsort((-counts, triples // vocab))  # pairs stay in their places
    tokens, weights = (triples % vocab)[best].tolist(), share[best].tolist()
    ends = (first + np.minimum(sizes, KEPT)).tolist()
    rows = zip(pairs.tolist(), first.tolist(), ends)
    known[key] = {pair: (tuple(tokens[at:end]), tuple(weights[at:end])) for pair, at, end in rows}
    return known[key]


class Trigrams:
    """The corpus, shared and never changed, under what one text taught: each trigram in it `reward`, up to `cap`, at each place."""

    def __init__(self, vocab: int, corpus: dict[int, Successors], reward: float, cap: float):
        self.vocab, self.corpus, self.reward, self.cap = vocab, corpus, reward, cap
        self.forget()

    def forget(self) -> None:
        self.own: dict[int, Successors] = {}
        self.known = 2

    def after(self, a: int, b: int) -> Successors:
        key = a * self.vocab + b
        return self.own.get(key) or self.corpus.get(key, NONE)

    def learn(self, text: list[int]) -> None:
        for at in range(self.known, len(text) if self.reward else 0):
            a, b, c = text[at - 2 : at + 1]
            found = dict(zip(*self.after(a, b)))
            found = {c: min(self.cap, found.pop(c, 0.0) + self.reward), **found}
            best = sorted(found.items(), key=lambda one: -one[1])[:KEPT]  # stable: the newest of equals first
            self.own[a * self.vocab + b] = tuple(c for c, _ in best), tuple(w for _, w in best)
        self.known = max(self.known, len(text))
