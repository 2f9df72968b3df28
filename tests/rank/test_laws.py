"""Laws of every judge and every strategy of the rank family; none is named here."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from smelt import registry
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Judge, Strategy
from smelt.spec import SmeltError

CLASSES = {name: registry.load("rank", name) for name in registry.names("rank")}
JUDGES = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Judge)}
STRATEGIES = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Strategy)}
SIZES = [0, 1, 2, 3, 9, 10, 11, 19, 20, 21, 25, 29, 30, 31, 40, 100, 257]


@dataclass(frozen=True)
class Oracle(Judge):
    """Sorts by the number a passage begins with, largest first, and notes the size of every call."""

    seen: list[int] = field(default_factory=list, compare=False)

    def __call__(self, query: str, passages: list[str], model: Any) -> list[int]:
        self.seen.append(len(passages))
        return sorted(range(len(passages)), key=lambda i: -int(passages[i].split()[0]))


@dataclass(frozen=True)
class Says(Judge):
    """Gives one fixed answer, whatever is asked."""

    answer: Any = None

    def __call__(self, query: str, passages: list[str], model: Any) -> list[int]:
        return self.answer


def test_every_method_is_one_or_the_other():
    assert set(JUDGES) ^ set(STRATEGIES) == set(CLASSES)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", SIZES)
def test_permutation_and_number_of_calls(name, n):
    judge = Oracle()
    strategy = STRATEGIES[name](judge=judge)
    grades = random.Random(n).choices(range(5), k=n)  # many equal ones, and equal passages
    order = strategy("q", [f"{g} text" for g in grades], None)
    assert sorted(order) == list(range(n))
    assert len(judge.seen) == strategy.calls(n)
    assert (strategy.calls(n) == 0) == (n == 0)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", SIZES)
def test_a_perfect_judge_gives_the_promised_top(name, n):
    strategy = STRATEGIES[name](judge=Oracle())
    top = strategy.exact_top(n)
    assert min(1, n) <= top <= n
    for seed in range(5):
        grades = random.Random(seed).sample(range(1000), n)
        order = strategy("q", [f"{g} text" for g in grades], None)
        assert [grades[i] for i in order[:top]] == sorted(grades, reverse=True)[:top]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("answer", [None, [], [0, 0], [0, 2], [1], [-1, 0], [0, 1, 2], ["0", "1"], "01", {0, 1}, 7, [0.0, 1.0], [0.5, 1]])
def test_an_answer_that_is_no_order_is_refused(name, answer):
    with pytest.raises(SmeltError, match=r"Says returned .* not an order of 2 passages"):
        STRATEGIES[name](judge=Says(answer))("q", ["a", "b"], None)
    assert STRATEGIES[name](judge=Says([1, 0]))("q", ["a", "b"], None) == [1, 0]


@pytest.fixture(scope="module")
def small():
    return Loaded(tiny("llama", context=2048), tiny_tokenizer(), None)


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_gives_a_permutation_and_the_same_twice(name, small):
    judge = JUDGES[name]()
    for n in [0, 1, 2, 7, judge.limit or 20]:
        passages = [f"def f{i * i % 7}(x): return x + {i}" for i in range(n)]
        order = judge("add to x", passages, small)
        assert sorted(order) == list(range(n)) and all(type(i) is int for i in order)
        assert judge("add to x", passages, small) == order


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_says_what_it_cannot_take(name, small):
    judge = JUDGES[name]()
    if judge.limit is not None:
        with pytest.raises(SmeltError, match=str(judge.limit)):
            judge("q", ["x"] * (judge.limit + 1), small)
        for cls in STRATEGIES.values():
            fields = cls.__dataclass_fields__
            if "window" in fields:
                with pytest.raises(SmeltError, match=str(judge.limit)):
                    cls(judge=judge, window=judge.limit + 1)


@pytest.mark.parametrize("name", JUDGES)
def test_hostile_texts(name, small):
    """Empty and blank passages, an empty query, end-of-text tokens and identifiers in the text."""
    passages = ["", " \n\t", "<|endoftext|>", "[A] [B] [3]", "é数🙂\x00", "word " * 5000]
    for query in ("", "<|endoftext|>", "[A]", "long " * 5000):
        assert sorted(JUDGES[name]()(query, passages, small)) == list(range(6))
