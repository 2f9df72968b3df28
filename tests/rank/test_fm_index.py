from __future__ import annotations

import random

import numpy as np
import pytest

from smelt.rank._fm_index import FMIndex, Key, intersective, largest


def corpus(seed, documents=12, types=5, longest=20):
    rng = random.Random(seed)
    return [[rng.randrange(types) for _ in range(rng.randrange(longest))] for _ in range(documents)] + [[], [1, 1, 1, 1, 1, 1]]


def occurrences(texts, ngram):
    """(document, place in it) of every occurrence."""
    size = len(ngram)
    return [(d, i) for d, text in enumerate(texts) for i in range(len(text) - size + 1) if tuple(text[i : i + size]) == tuple(ngram)]


@pytest.mark.parametrize("seed", range(5))
def test_counts_places_and_continuations_are_those_of_a_scan(seed):
    texts, rng = corpus(seed), random.Random(seed + 100)
    index = FMIndex(texts)
    assert index.tokens == sum(map(len, texts)) and index.documents == len(texts)
    ngrams = [(), (7,), (1, 7)] + [tuple(rng.randrange(5) for _ in range(rng.randrange(1, 5))) for _ in range(60)]
    for ngram in ngrams:
        lo, hi = index.range(ngram)
        found = occurrences(texts, ngram)
        if ngram:
            places = index.places(lo, hi, len(ngram))
            documents = index.of(places)
            assert list(zip(documents.tolist(), (places - index.starts[documents]).tolist(), strict=True)) == found
        which, tokens, low, high = index.continuations(np.array([lo, lo]), np.array([hi, hi]))
        expected = {t: n for t in range(5) if (n := len(occurrences(texts, (*ngram, t))))}
        for one in (0, 1):
            assert dict(zip(tokens[which == one].tolist(), (high - low)[which == one].tolist(), strict=True)) == expected


def test_a_corpus_of_nothing():
    for texts in ([], [[]], [[], []]):
        index = FMIndex(texts)
        assert index.tokens == 0 and index.range((3,))[0] == index.range((3,))[1]
        assert not len(index.continuations(np.array([0]), np.array([index.size]))[0])
        assert largest(index, []).tolist() == intersective(index, [], np.ones(4), 2.0, 0.8).tolist() == [0.0] * len(texts)


def by_hand(texts, keys, single, alpha, beta):
    """One document, one key, one place at a time."""
    scores = []
    for d, text in enumerate(texts):
        taken, used, score = set(), set(), 0.0
        for key in sorted(keys, key=lambda k: (-k.weight, k.tokens)):
            counted = False
            for document, i in occurrences(texts, key.tokens):
                span = set(range(i, i + len(key.tokens)))
                if document == d and not span & taken:
                    taken |= span
                    counted = True
            if counted:
                types = set(key.tokens)
                score += key.weight**alpha * (1 - beta + beta * len(types - used) / len(types))
                used |= types
        for token in {t for i, t in enumerate(text) if i not in taken}:
            score += single[token] * (1 - beta if token in used else 1.0)
        scores.append(score)
    return scores


def keys_of(index, texts, rng, count):
    made = {tuple(rng.choice(texts[:12])[at : at + rng.randrange(1, 5)]) for at in [rng.randrange(8) for _ in range(count)]} - {()}
    return [Key(k, rng.choice([0.5, 1.0, 2.5, rng.random() * 3 + 0.1]), *index.range(k)) for k in sorted(made)]


@pytest.mark.parametrize("seed", range(8))
def test_scores_are_those_of_the_loop(seed):
    texts, rng = corpus(seed), random.Random(seed)
    index = FMIndex(texts)
    keys = keys_of(index, texts, rng, 12)
    single = np.array([rng.random() if rng.random() < 0.6 else 0.0 for _ in range(5)])
    for alpha, beta in ((2.0, 0.8), (1.0, 0.0), (0.5, 1.0)):
        np.testing.assert_allclose(intersective(index, keys, single, alpha, beta), by_hand(texts, keys, single, alpha, beta), atol=1e-9)
    expected = [
        max((k.weight for k in keys if any(o[0] == d for o in occurrences(texts, k.tokens))), default=0.0) for d in range(len(texts))
    ]
    np.testing.assert_array_equal(largest(index, keys), expected)
    for some in range(len(keys)):  # a maximum never falls when a key is added
        assert (largest(index, keys[: some + 1]) >= largest(index, keys[:some])).all()


def test_a_long_key_can_take_the_places_of_two_good_ones():
    """The example of the sum that is not monotone: 3^2 instead of 2 x 2.9^2."""
    texts = [[1, 2, 3, 4]]
    index = FMIndex(texts)
    edges = [Key(k, 2.9, *index.range(k)) for k in ((1, 2), (3, 4))]
    middle = Key((2, 3), 3.0, *index.range((2, 3)))
    alone = intersective(index, edges, np.zeros(0), 2.0, 0.8)
    assert alone[0] == pytest.approx(2 * 2.9**2) and intersective(index, [*edges, middle], np.zeros(0), 2.0, 0.8)[0] == 3.0**2


def test_with_many_documents_the_best_by_rare_keys_are_scored_in_full():
    texts = [[9, 1], [9, 2], [9, 1, 2], [9], [3]]
    index = FMIndex(texts)
    keys = [Key((9,), 5.0, *index.range((9,))), Key((1,), 2.0, *index.range((1,))), Key((2,), 1.0, *index.range((2,)))]
    whole = intersective(index, keys, np.zeros(0), 1.0, 0.0)
    assert whole.tolist() == [7.0, 6.0, 8.0, 5.0, 0.0]
    assert intersective(index, keys, np.zeros(0), 1.0, 0.0, rare=2, full=2).tolist() == [7.0, 0.0, 8.0, 0.0, 0.0]
    assert intersective(index, keys, np.zeros(0), 1.0, 0.0, rare=2, full=4).tolist() == [7.0, 6.0, 8.0, 0.0, 0.0]


def test_occurrences_that_overlap_are_taken_from_the_left():
    """Of "1 1" in "1 1 1" the first two places are taken, the third is free for a single token."""
    index = FMIndex([[1, 1, 1]])
    assert intersective(index, [Key((1, 1), 3.0, *index.range((1, 1)))], np.array([0.0, 0.5]), 2.0, 0.8)[0] == pytest.approx(9 + 0.2 * 0.5)
