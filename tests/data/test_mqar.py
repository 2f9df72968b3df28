from __future__ import annotations

import collections

import pytest

from smelt.data import SPLITS
from smelt.data.mqar import Mqar, _letters
from smelt.spec import SmeltError


def test_every_key_is_shown_with_its_value_and_asked_for_once():
    corpus = Mqar(pairs=5, length=40, words=30, count=50)
    for split in SPLITS:
        for words, answers in corpus.sequences(split):
            assert len(words) == 40 and len(answers) == 5 == len(set(answers))
            shown = dict(zip(words[:10:2], words[1:10:2], strict=True))
            assert len(shown) == 5 and all(k[0] == "k" and v[0] == "v" for k, v in shown.items())
            assert sorted(words[i - 1] for i in answers) == sorted(shown)
            assert all(shown[words[i - 1]] == words[i] and i >= 11 for i in answers)
            rest = set(range(10, 40)) - {i for a in answers for i in (a - 1, a)}
            assert all(words[i][0] == "x" for i in rest)


def test_documents_are_the_sequences_as_text():
    corpus = Mqar(count=70)
    documents = list(corpus.documents("train"))
    assert len(documents) == 70 and len(list(corpus.documents("test"))) == 64
    for document, (words, _) in zip(documents, corpus.sequences("train"), strict=True):
        assert document.text == " " + " ".join(words) + "\n"


def test_a_small_power_asks_soon_and_a_power_of_one_anywhere():
    """The first slot of p(g) ~ g^(power - 1) against all: compared with its own formula for one pair."""
    for power in (0.01, 1.0):
        corpus = Mqar(pairs=1, length=18, words=9, power=power, count=2000)
        slots = collections.Counter((answers[0] - 3) // 2 for _, answers in corpus.sequences("train"))
        whole = sum(g ** (power - 1) for g in range(1, 9))
        for g in range(1, 9):
            expected = g ** (power - 1) / whole
            assert abs(slots[g - 1] / 2000 - expected) < 5 * (expected / 2000) ** 0.5


def test_seeds_and_splits_differ_and_repeat():
    one = [words for words, _ in Mqar(count=5).sequences("train")]
    assert one == [words for words, _ in Mqar(count=5).sequences("train")]
    assert one != [words for words, _ in Mqar(count=5, seed=1).sequences("train")]
    assert Mqar(seed=1).digest() != Mqar().digest() != Mqar(power=0.5).digest()


def test_letters_are_all_different():
    assert len({_letters(i) for i in range(2000)}) == 2000 and _letters(0) == "aa" and _letters(27) == "bb" and _letters(26 * 26) == "baa"


def test_what_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="slots"):
        Mqar(pairs=16, length=63)
    with pytest.raises(SmeltError, match="words=4"):
        Mqar(words=4)
