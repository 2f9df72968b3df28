"""Counting is tested against a loop, and learning against the formula, through the method in test_aded.py."""

from __future__ import annotations

from smelt.decode._trigrams import KEPT, Trigrams


def test_what_one_text_taught_lies_over_the_corpus_and_is_forgotten_with_it():
    corpus = {1 * 10 + 2: ((3, 4), (0.75, 0.25))}
    table = Trigrams(10, corpus, reward=0.5, cap=2.0)
    assert table.after(1, 2) == ((3, 4), (0.75, 0.25)) and table.after(2, 3) == ((), ())
    table.learn([1, 2, 4])
    assert table.after(1, 2) == ((4, 3), (0.75, 0.75))  # of equals the newest first
    table.learn([1, 2, 4, 1, 2, 4])
    assert table.after(1, 2) == ((4, 3), (1.25, 0.75)) and table.after(2, 4) == ((1,), (0.5,))
    assert corpus == {12: ((3, 4), (0.75, 0.25))}
    table.forget()
    assert table.after(1, 2) == ((3, 4), (0.75, 0.25)) and not table.own


def test_at_most_twelve_successors_stay():
    table = Trigrams(100, {}, reward=1.0, cap=9.0)
    table.learn([token for c in range(20) for token in (1, 2, 10 + c)])
    assert len(table.after(1, 2)[0]) == KEPT and table.after(1, 2)[0][0] == 29


def test_without_a_reward_nothing_is_learned():
    table = Trigrams(10, {}, reward=0.0, cap=9.0)
    table.learn([1, 2, 3] * 5)
    assert table.own == {}
