from __future__ import annotations

from collections import Counter

import pytest

from smelt.distill._tasks import LABELS, arithmetic, keywords, written
from smelt.spec import SmeltError


def test_sums_are_right_and_so_is_every_step_of_their_rationale():
    rows = arithmetic(200, 0)
    assert len({row["input"] for row in rows}) == 200
    for row in rows:
        assert eval(row["input"]) == int(row["label"])
        steps = [step.split("=") for step in row["rationale"].rstrip(".").split(".")]
        assert all(eval(left) == int(right) for left, right in steps)
        assert int(steps[-1][1]) == int(row["label"])
    assert rows == arithmetic(200, 0) != arithmetic(200, 1)
    with pytest.raises(SmeltError, match="at most"):
        arithmetic(3000, 0)


def test_one_word_of_a_text_says_its_label_and_rare_words_are_rare():
    rows = keywords(1600, 0)
    assert Counter(row["label"] for row in rows) == dict.fromkeys(LABELS, 200)
    counts: Counter = Counter()
    for row in rows:
        found = [(label, word) for label, words in LABELS.items() for word in row["text"].split() if word in words]
        assert [label for label, _ in found] == [row["label"]]
        counts[list(LABELS[row["label"]]).index(found[0][1])] += 1
    assert counts[0] > counts[1] > counts[2] > counts[5]


def test_the_program_writes_what_it_is_asked_for():
    rows = written({"animal": 3, "tool": 0, "metal": 2}, 4)
    assert Counter(row["label"] for row in rows) == {"animal": 3, "metal": 2}
    assert rows == written({"animal": 3, "tool": 0, "metal": 2}, 4)
