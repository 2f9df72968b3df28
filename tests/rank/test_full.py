import random

import pytest

from smelt.rank import Answer, Asked, Judge
from smelt.rank._order import order
from smelt.rank.full import Full
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


class Numbers(Judge):
    """Largest first; keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def answers(self, asked, model):
        self.shown += [list(a.passages) for a in asked]
        return [Answer(sorted(range(len(a.passages)), key=lambda i: -float(a.passages[i])), None) for a in asked]


@pytest.mark.parametrize("n", [0, 1, 2, 27, 100])
def test_one_window_holds_everything(n):
    grades = random.Random(n).sample(range(1000), n)
    judge = Numbers()
    found = order(Full(judge), [Asked("q", [str(g) for g in grades])], None)[0]
    assert [grades[i] for i in found] == sorted(grades, reverse=True)
    assert judge.shown == ([[str(g) for g in grades]] if n > 1 else [])  # one passage alone is not judged
    assert Full(judge).calls(n) == Full(judge).chain(n) == (1 if n else 0) and Full(judge).exact_top(n) == n


def test_more_passages_than_the_judge_takes_are_refused():
    with pytest.raises(SmeltError, match=r"first_token reads at most 26 passages at once and was given 27; call it through sliding_window"):
        order(parse("full(judge=first_token())", "rank"), [Asked("q", ["p"] * 27)], None)


def test_recipe_text():
    method = parse("full(judge=permutation_text(strict=True))", "rank")
    assert text(method) == "full(judge=permutation_text(strict=True))" and text(Full()) == "full()"
    check(method)
