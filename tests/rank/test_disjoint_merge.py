import random

import pytest
import torch

from smelt.rank import Answer, Asked, Judge
from smelt.rank._order import order
from smelt.rank.disjoint_merge import DisjointMerge
from smelt.registry import parse
from smelt.spec import SmeltError


class Numbers(Judge):
    """A passage's score is its number. Notes what was asked in each batch."""

    comparable = True

    def __init__(self, scores=None):
        self.seen, self.given = [], scores

    def answers(self, asked, model):
        self.seen.append([list(a.passages) for a in asked])
        found = []
        for a in asked:
            score = torch.tensor([float(p) for p in a.passages]) if self.given is None else self.given
            found.append(Answer(list(range(len(a.passages))), score))  # the order of an answer is not used
        return found


@pytest.mark.parametrize("window", [2, 3, 20])
@pytest.mark.parametrize("n", [0, 1, 2, 3, 19, 20, 21, 40, 41])
def test_one_global_stable_sort_of_windows_read_at_one_moment(n, window):
    grades = random.Random(n).choices(range(6), k=n)  # many equal ones
    judge = Numbers()
    strategy = DisjointMerge(judge, window)
    found = order(strategy, [Asked("q", [str(g) for g in grades])], None)[0]
    assert found == sorted(range(n), key=lambda i: -grades[i])
    assert judge.seen == ([[[str(g) for g in grades[at : at + window]] for at in range(0, n, window)]] if n else [])
    assert strategy.calls(n) == sum(map(len, judge.seen)) and strategy.chain(n) == len(judge.seen) and strategy.exact_top(n) == n


def test_five_calls_where_a_sliding_window_needs_nine():
    assert DisjointMerge(Numbers()).calls(100) == 5 and parse("sliding_window()", "rank").calls(100) == 9


def test_scores_of_different_precision_are_compared_in_float64():
    """In float32 both would be equal, and the first would stay."""
    scores = [torch.tensor([1.0, 0.0]), torch.tensor([1.0 + 1e-12, 0.5], dtype=torch.float64)]
    plan = DisjointMerge(Numbers(), window=2).rounds(4)
    next(plan)
    with pytest.raises(StopIteration) as end:
        plan.send([Answer([0, 1], s) for s in scores])
    assert end.value.value == [2, 0, 3, 1]


@pytest.mark.parametrize(
    "scores", [None, torch.zeros(3), torch.zeros(2, 1), torch.tensor([0.0, float("nan")]), torch.tensor([0.0, float("inf")])]
)
def test_an_answer_without_a_finite_score_for_each_is_refused(scores):
    class Bad(Numbers):
        def answers(self, asked, model):
            return [Answer([0, 1], scores) for _ in asked]

    with pytest.raises(SmeltError, match="Bad gave no finite score for each of 2 passages"):
        order(DisjointMerge(Bad()), [Asked("q", ["1", "2"])], None)


def test_judges_whose_scores_mean_something_inside_one_call_only_are_refused():
    for judge in ("first_token", "permutation_text"):
        with pytest.raises(SmeltError, match="inside one call only"):
            parse(f"disjoint_merge(judge={judge}())", "rank")
    with pytest.raises(SmeltError):
        DisjointMerge(judge="first_token")
    with pytest.raises(SmeltError):
        parse("disjoint_merge(window=1)", "rank")
