"""Dedup against a quadratic reference, and its set of keys against Python's."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt import registry
from smelt.data import SPLITS, Document
from smelt.data.dedup import ORDER, Dedup, _Seen
from smelt.spec import SmeltError


@dataclass(frozen=True)
class Listed:
    """A corpus from three lists."""

    texts: tuple[tuple[str, ...], ...]  # train, validation, test

    def documents(self, split):
        for i, text in enumerate(self.texts[SPLITS.index(split)]):
            yield Document(f"{split}:{i}", text)

    def digest(self):
        return repr(self.texts)


TEXTS = st.lists(st.sampled_from(["a b", "ab", "a  b", "c", "c\n", "d", " d ", "e"]), max_size=8).map(tuple)


@given(st.tuples(TEXTS, TEXTS, TEXTS), st.sampled_from(["within", "across", "both"]), st.booleans())
@settings(max_examples=300, deadline=None)
def test_equals_comparing_every_pair(texts, scope, spaces):
    corpus = Listed(texts)

    def same(a, b):
        return a == b if spaces else "".join(a.split()) == "".join(b.split())

    for split in SPLITS:
        own = list(corpus.documents(split))
        before = [d.text for s in ORDER[: ORDER.index(split)] for d in corpus.documents(s)]
        kept, within, across = [], 0, 0
        for i, document in enumerate(own):
            if scope != "within" and any(same(document.text, other) for other in before):
                across += 1
            elif scope != "across" and any(same(document.text, other.text) for other in own[:i]):
                within += 1
            else:
                kept.append(document)
        method = Dedup(corpus, scope=scope, spaces=spaces)
        assert list(method.documents(split)) == kept
        assert method.counts(split) == (len(kept), within, across)


@given(TEXTS, TEXTS, TEXTS)
@settings(max_examples=100, deadline=None)
def test_held_out_text_is_never_trained_on(train, validation, test):
    method = Dedup(Listed((train, validation, test)))
    found = [[d.text for d in method.documents(split)] for split in SPLITS]
    everything = [text for part in found for text in part]
    assert len(everything) == len(set(everything)) and set(everything) == {*train, *validation, *test}
    assert set(found[2]) == set(test)
    assert Dedup(method).counts("train") == (len(found[0]), 0, 0)  # a second time finds nothing


def test_the_set_of_keys_is_a_set(monkeypatch):
    monkeypatch.setattr(_Seen, "RECENT", 16)
    random, seen, reference = np.random.default_rng(0), _Seen(), set()
    for key in (int(k) for k in random.integers(0, 2**64, 3000, dtype=np.uint64) % np.uint64(2000)):
        assert (key in seen) == (key in reference)
        assert seen.add(key) == (key not in reference)
        reference.add(key)
    assert all((a[:-1] < a[1:]).all() for a in seen.runs)
    assert sum(map(len, seen.runs)) + len(seen.recent) == len(reference)
    sizes = [len(a) for a in seen.runs]
    assert all(a > 4 * b for a, b in itertools.pairwise(sizes))
    for key in (0, 2**64 - 1):
        assert seen.add(key) == (key not in reference) and key in seen


def test_eight_bytes_are_held_for_each_document():
    seen, n = _Seen(), 200_000
    for i in range(n):
        seen.add(i * 2**40 + i)
    assert sum(a.nbytes for a in seen.runs) <= 8 * n and len(seen.recent) < _Seen.RECENT


def test_something_else_than_a_corpus_is_refused():
    with pytest.raises(SmeltError, match="corpus"):
        registry.parse("dedup(corpus=3)", "data")
    with pytest.raises(SmeltError, match="corpus"):
        registry.parse("dedup()", "data")


def test_the_digest_follows_settings_and_corpus():
    corpus = Listed((("a",), (), ()))
    digests = {
        Dedup(corpus).digest(),
        Dedup(corpus, scope="across").digest(),
        Dedup(corpus, spaces=False).digest(),
        Dedup(Listed((("b",), (), ()))).digest(),
    }
    assert len(digests) == 4 and Dedup(corpus).digest() in digests
