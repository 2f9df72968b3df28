from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from smelt.data import _bigram
from smelt.data._bigram import Bigram

V = 9


def rows(seed=0, count=30):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, V - 2, draw.integers(1, 12)).tolist() for _ in range(count)]  # the last two ids never occur


def slow(text, a, b):
    pairs = [pair for row in text for pair in itertools.pairwise(row)]
    alone = (sum(y == b for _, y in pairs) + 1) / (len(pairs) + V)
    follow = [y for x, y in pairs if x == a]
    kinds = max(len(set(follow)), 1)
    return (follow.count(b) + kinds * alone) / (len(follow) + kinds)


@pytest.mark.parametrize("batch", [1 << 20, 3])
def test_equals_counting_with_loops_and_sums_to_one(batch, monkeypatch):
    monkeypatch.setattr(_bigram, "BATCH", batch)
    text = rows()
    model = Bigram(iter(text), V)
    for a in range(V):
        got = [math.exp(model.log_probabilities([a, b])[0]) for b in range(V)]
        np.testing.assert_allclose(got, [slow(text, a, b) for b in range(V)], rtol=1e-12)
        assert sum(got) == pytest.approx(1)
    row = rows(1, 1)[0] * 3
    np.testing.assert_allclose(model.log_probabilities(row), [math.log(slow(text, a, b)) for a, b in itertools.pairwise(row)])


def test_without_text_every_token_is_as_likely():
    np.testing.assert_allclose(Bigram([], V).log_probabilities([0, 3, 3]), [-math.log(V)] * 2)


def test_sixteen_bytes_for_each_pair():
    model = Bigram(rows(), V)
    pairs = {pair for row in rows() for pair in itertools.pairwise(row)}
    assert model.keys.nbytes + model.counts.nbytes == 16 * len(pairs)
