import random

import pytest
import torch

from smelt.rank import Answer, Asked, Judge
from smelt.rank._order import order
from smelt.rank.tournament import Tournament
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


class Numbers(Judge):
    """Largest first; keeps the windows of each round."""

    comparable = True  # so that one passage alone is asked for as well

    def __init__(self):
        self.rounds = []

    def answers(self, asked, model):
        self.rounds.append([[int(p) for p in a.passages] for a in asked])
        return [Answer(sorted(range(len(a.passages)), key=lambda i: -int(a.passages[i])), torch.zeros(len(a.passages))) for a in asked]


def ranked(strategy, grades):
    return [grades[i] for i in order(strategy, [Asked("q", [str(g) for g in grades])], None)[0]]


def slow(grades, window, keep):
    """The rule, written as recursion over lists of (place before, grade). Returns the order and the groups of each stage."""
    if len(grades) <= window:
        return sorted(grades, reverse=True), [1] if grades else []
    count = 1
    while count * window < len(grades):
        count += 1
    groups = [[] for _ in range(count)]
    for i, grade in enumerate(grades):
        groups[i % count].append((i, grade))
    groups = [sorted(group, key=lambda pair: -pair[1]) for group in groups]
    go, out = [], []
    for place in range(max(map(len, groups))):
        for _, grade in sorted(group[place] for group in groups if place < len(group)):
            (go if place < keep else out).append(grade)
    top, stages = slow(go, window, keep)
    return top + out, [count, *stages]


def test_every_small_setting():
    draw = random.Random(0)
    for n in range(24):
        for window in range(2, 9):
            for keep in range(1, window // 2 + 1):
                judge, grades = Numbers(), draw.sample(range(99), n)
                strategy = Tournament(judge, window, keep)
                expected, stages = slow(grades, window, keep)
                assert ranked(strategy, grades) == expected, (n, window, keep)
                assert [len(batch) for batch in judge.rounds] == stages
                assert strategy.calls(n) == sum(stages) and strategy.chain(n) == len(stages)
                assert all(len(w) <= window for batch in judge.rounds for w in batch)
                assert all(max(map(len, batch)) - min(map(len, batch)) <= 1 for batch in judge.rounds)
                top = strategy.exact_top(n)
                assert top == (n if n <= window else keep)
                assert expected[:top] == sorted(grades, reverse=True)[:top]


def test_the_numbers_of_the_defaults():
    """100 passages: 5 groups of 20, 50 go on in 3, 30 in 2, 20 are the last window."""
    judge = Numbers()
    strategy = Tournament(judge)
    ranked(strategy, random.Random(1).sample(range(1000), 100))
    assert [[len(w) for w in batch] for batch in judge.rounds] == [[20] * 5, [17, 17, 16], [15, 15], [20]]
    assert (strategy.calls(100), strategy.chain(100), strategy.exact_top(100)) == (11, 4, 10)


def test_one_place_more_cannot_be_promised():
    """The best keep + 1 in one group: the last of them is out in the first stage."""
    for n, window, keep in ((100, 20, 10), (30, 8, 3), (9, 8, 4), (12, 5, 1)):
        groups = -(-n // window)
        grades = [1000 - i if i % groups == 0 else i for i in range(n)]
        found = ranked(Tournament(Numbers(), window, keep), grades)
        best = sorted(grades, reverse=True)
        assert found[:keep] == best[:keep] and found[keep] != best[keep]


def test_groups_are_seeded():
    """What the first stage put first meets late: places 0..g-1 are in g different groups."""
    judge = Numbers()
    ranked(Tournament(judge, 4, 2), list(range(12)))
    assert judge.rounds[0] == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert judge.rounds[1] == [[9, 11, 7], [10, 6, 8]]  # the groups' best in the order before, then the second ones, dealt out again


def test_ten_thousand_passages_end_soon():
    strategy = Tournament(Numbers())
    assert strategy.chain(10_000) <= 12 and strategy.calls(10_000) <= 10_000 / 10 * 1.2
    for keep in range(1, 11):
        for n in range(0, 400):
            assert Tournament(Numbers(), 20, keep).calls(n) >= -(-n // 20)


def test_settings_that_may_drop_nobody_are_refused():
    with pytest.raises(SmeltError, match=r"keep=11 is more than half of window=20.*keep=10 is the most"):
        parse("tournament(keep=11)", "rank")
    with pytest.raises(SmeltError, match="FirstToken takes at most 26"):
        parse("tournament(window=27)", "rank")
    for bad in ("tournament(window=1)", "tournament(keep=0)", "tournament(judge=tournament())"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")


def test_recipe_text():
    method = parse("tournament(judge=first_token(words=50), window=10, keep=5)", "rank")
    assert text(method) == "tournament(judge=first_token(words=50), window=10, keep=5)"
    check(method)
