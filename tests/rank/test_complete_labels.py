import hashlib
import random

import pytest
import torch

from smelt.rank import Answer, Asked, Judge
from smelt.rank._order import order
from smelt.rank.complete_labels import CompleteLabels
from smelt.rank.sliding_window import SlidingWindow
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


class Numbers(Judge):
    """Largest first; keeps the windows of each round."""

    comparable = True  # so that one passage alone is asked for as well

    def __init__(self):
        self.rounds = []

    def places(self, passages):
        return sorted(range(len(passages)), key=lambda i: -int(passages[i]))

    def answers(self, asked, model):
        self.rounds.append([list(a.passages) for a in asked])
        return [Answer(self.places(a.passages), torch.zeros(len(a.passages))) for a in asked]


class Whims(Numbers):
    """Orders a window by a hash of all that is in it: no fixed score, the same each time."""

    def places(self, passages):
        whole = " ".join(passages)
        return sorted(range(len(passages)), key=lambda i: hashlib.sha256(f"{whole}|{passages[i]}|{i}".encode()).digest())


def ranked(strategy, passages):
    return [passages[i] for i in order(strategy, [Asked("q", passages)], None)[0]]


def one_after_the_other(judge, passages, window, step):
    """Pass after pass, window after window; returns the list and the number of calls."""
    ranked, calls, frozen = list(passages), 0, 0
    while True:
        end = len(ranked)
        while True:
            start = max(frozen, end - window)
            part = ranked[start:end]
            ranked[start:end] = [part[i] for i in judge.places(part)]
            calls += 1
            if start == frozen:
                break
            end -= step
        if len(ranked) - frozen <= window:
            return ranked, calls
        frozen += step


def test_every_small_setting_is_pass_after_pass():
    """Exact for a judge with a fixed score; for one without, the same list as without overlap in time, call for call."""
    draw = random.Random(0)
    for n in range(1, 22):
        for window in range(2, 9):
            for step in range(1, window // 2 + 1):
                passages = [str(i) for i in draw.sample(range(99), n)]
                for judge in (Numbers(), Whims()):
                    strategy = CompleteLabels(judge, window, step)
                    expected, calls = one_after_the_other(judge, passages, window, step)
                    assert ranked(strategy, passages) == expected, (n, window, step)
                    assert strategy.calls(n) == calls == sum(map(len, judge.rounds))
                    assert strategy.chain(n) == len(judge.rounds)
                    for batch in judge.rounds:  # nothing is read twice at one moment
                        assert len({p for w in batch for p in w}) == sum(map(len, batch))
                assert strategy.exact_top(n) == n
                assert ranked(CompleteLabels(Numbers(), window, step), passages) == sorted(passages, key=int, reverse=True)


@pytest.mark.parametrize("n", [20, 21, 25, 30, 31, 55, 99, 100, 101])
def test_calls_and_chain_of_the_defaults(n):
    passes = 1 + -(-max(0, n - 20) // 10)
    strategy = CompleteLabels(Numbers())
    assert strategy.calls(n) == passes * (passes + 1) // 2 and strategy.chain(n) == 2 * passes - 1


def tau(order):
    """Kendall's, against falling numbers."""
    n = len(order)
    return sum(1 if order[i] > order[j] else -1 for i in range(n) for j in range(i + 1, n)) / (n * (n - 1) / 2)


def test_45_calls_sort_a_hundred_where_one_pass_of_nine_sorts_the_top():
    passages = [str(i) for i in random.Random(5).sample(range(1000), 100)]
    judge = Numbers()
    strategy = CompleteLabels(judge)
    assert tau([int(p) for p in ranked(strategy, passages)]) == 1.0
    assert (strategy.calls(100), strategy.chain(100)) == (45, 17) and sum(map(len, judge.rounds)) == 45
    once = SlidingWindow(Numbers())
    assert once.calls(100) == 9 and 0.2 < tau([int(p) for p in ranked(once, passages)]) < 0.8


def test_a_larger_step_would_freeze_what_is_not_sorted():
    with pytest.raises(SmeltError, match=r"step=11 is more than half of window=20.*step=10 is the most"):
        parse("complete_labels(step=11)", "rank")
    passages = ["5", "4", "3", "9", "8", "7", "6"]  # window 4, step 3: one place is exact after a pass, three would be frozen
    assert one_after_the_other(Numbers(), passages, 4, 3)[0] != sorted(passages, reverse=True)
    with pytest.raises(SmeltError, match="FirstToken takes at most 26"):
        parse("complete_labels(window=27)", "rank")
    for bad in ("complete_labels(window=1)", "complete_labels(step=0)", "complete_labels(judge=complete_labels())"):
        with pytest.raises(SmeltError):
            parse(bad, "rank")


def test_recipe_text():
    method = parse("complete_labels(judge=first_token(words=50), window=10, step=5)", "rank")
    assert text(method) == "complete_labels(judge=first_token(words=50), window=10, step=5)"
    check(method)
