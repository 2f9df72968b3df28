"""The helper smelt/rank/_order.py; what it refuses is a law of the family (test_laws.py)."""

import numpy
import pytest
import torch

from smelt.rank import Answer, Asked, Judge, Strategy
from smelt.rank._order import ask, fits, order, sort
from smelt.rank.sliding_window import SlidingWindow
from smelt.spec import SmeltError


class Fixed(Judge):
    def answers(self, asked, model):
        return [Answer([numpy.int64(1), numpy.int64(0), 2], None) for _ in asked]


class Numbers(Judge):
    """Largest first; keeps what it was shown in each batch."""

    def __init__(self):
        self.batches = []

    def answers(self, asked, model):
        self.batches.append([(a.query, list(a.passages)) for a in asked])
        return [Answer(sorted(range(len(a.passages)), key=lambda i: -int(a.passages[i])), None) for a in asked]


def test_numbers_of_any_integer_type_become_ints():
    ((places, _),) = ask(Fixed(), [Asked("q", ["a", "b", "c"])], None)
    assert places == [1, 0, 2] and all(type(i) is int for i in places)


def test_windows_of_many_queries_that_wait_at_one_moment_are_one_batch():
    """Three lists of 5, 3 and no passages, window 4, step 2: two rounds for the first, one for the second."""
    judge = Numbers()
    found = order(SlidingWindow(judge, 4, 2), [Asked("a", list("31425")), Asked("b", list("132")), Asked("c", [])], None)
    assert found == [[4, 2, 0, 3, 1], [1, 2, 0], []]
    assert [[q for q, _ in batch] for batch in judge.batches] == [["a", "b"], ["a"]]


def test_a_passage_alone_is_asked_for_only_where_its_score_is_wanted():
    judge = Numbers()
    assert [a.order for a in ask(judge, [Asked("a", ["7"]), Asked("b", list("12")), Asked("c", ["1"])], None)] == [[0], [1, 0], [0]]
    assert judge.batches == [[("b", ["1", "2"])]]


def test_equal_scores_keep_the_order_given():
    (answer,) = sort([torch.tensor([1.0, 3.0, 1.0, 3.0, 2.0])])
    assert answer.order == [1, 3, 4, 0, 2] and answer.scores[0] == 1.0


class Compares(Strategy):
    compares = True
    judge = Numbers()
    rounds = calls = chain = exact_top = None


def test_a_strategy_that_compares_scores_of_different_calls_refuses_a_judge_whose_scores_do_not(monkeypatch):
    from smelt import registry

    monkeypatch.setattr(registry, "name_of", lambda method: ("rank", "compares"))
    with pytest.raises(SmeltError, match="compares scores of different calls, and those of Numbers mean something inside one call only"):
        fits(Compares())
