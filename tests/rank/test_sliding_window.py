import random

import pytest

from smelt.rank import Answer, Asked
from smelt.rank._order import order as ask
from smelt.rank.first_token import FirstToken
from smelt.rank.sliding_window import SlidingWindow
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


class Recorder(FirstToken):
    """Sorts numbers, largest first, and keeps what it was shown. (Under no limit.)"""

    limit = None

    def __init__(self):
        object.__setattr__(self, "shown", [])

    comparable = True  # so that one passage alone is asked for as well

    def answers(self, asked, model):
        self.shown += [list(a.passages) for a in asked]
        return [Answer(sorted(range(len(a.passages)), key=lambda i: -int(a.passages[i])), None) for a in asked]


@pytest.mark.parametrize(
    ("n", "window", "step", "calls"),
    [(100, 20, 10, 9), (50, 20, 10, 4), (40, 20, 10, 3), (25, 20, 10, 2), (8, 20, 10, 1), (30, 10, 5, 5), (32, 8, 4, 7)],
)
def test_known_numbers_of_calls(n, window, step, calls):
    """The table of the paper's setting; every one counted as well."""
    judge = Recorder()
    ask(SlidingWindow(judge, window, step), [Asked("q", [str(i) for i in range(n)])], None)[0]
    assert SlidingWindow(judge, window, step).calls(n) == calls == len(judge.shown)


def test_windows_are_those_of_the_loop_from_the_back():
    """Seven passages, window 4, step 2: places 3..6, 1..4, then what is left at the front, 0..2."""
    judge, passages = Recorder(), ["1", "6", "2", "5", "3", "7", "4"]
    order = ask(SlidingWindow(judge, 4, 2), [Asked("q", passages)], None)[0]
    assert judge.shown == [["5", "3", "7", "4"], ["6", "2", "7", "5"], ["1", "7", "6"]]
    assert [passages[i] for i in order] == ["7", "6", "1", "5", "2", "4", "3"]


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_every_small_setting(passes):
    """All n, windows and steps up to 9: permutation, calls counted, and the promised top, on random orders."""
    shuffle = random.Random(passes)
    for n in range(1, 14):
        for window in range(2, 9):
            for step in range(1, window):
                judge = Recorder()
                strategy = SlidingWindow(judge, window, step, passes)
                grades = shuffle.sample(range(99), n)
                order = ask(strategy, [Asked("q", [str(g) for g in grades])], None)[0]
                assert sorted(order) == list(range(n)) and len(judge.shown) == strategy.calls(n)
                top = strategy.exact_top(n)
                assert [grades[i] for i in order[:top]] == sorted(grades, reverse=True)[:top], (n, window, step, passes)


def test_one_place_more_cannot_be_promised():
    """For each setting some order leaves the place after the promised ones wrong."""
    shuffle = random.Random(0)
    for window, step, passes in ((20, 10, 1), (8, 4, 1), (6, 4, 2), (8, 2, 2), (8, 4, 3)):
        n, wrong = window + 4 * step, False
        strategy = SlidingWindow(Recorder(), window, step, passes)
        for _ in range(300):
            grades = shuffle.sample(range(n), n)
            order = ask(strategy, [Asked("q", [str(g) for g in grades])], None)[0]
            wrong = wrong or grades[order[strategy.exact_top(n)]] != n - 1 - strategy.exact_top(n)
        assert wrong, (window, step, passes)


def test_settings_that_rank_nothing_are_refused():
    with pytest.raises(SmeltError, match="step=20 must be below window=20"):
        parse("sliding_window(window=20, step=20)", "rank")
    with pytest.raises(SmeltError, match="FirstToken takes at most 26"):
        parse("sliding_window(window=27)", "rank")
    for bad in ("sliding_window(window=1)", "sliding_window(step=0)", "sliding_window(passes=0)", "sliding_window(judge=sliding_window())"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")


def test_recipe_text():
    method = parse("sliding_window(judge=first_token(words=50), window=10, step=5)", "rank")
    assert text(method) == "sliding_window(judge=first_token(words=50), window=10, step=5)"
    check(method)
