"""Laws of every judge, retriever and strategy of the rank family; none is named here."""

from __future__ import annotations

import dataclasses
import random
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from smelt import registry
from smelt._train_around import halved
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Answer, Asked, Embedder, Judge, Retriever, Scoring, Strategy
from smelt.rank._order import order
from smelt.rank._training import Labelled, Learns, write
from smelt.spec import SmeltError

CLASSES = {name: registry.load("rank", name) for name in registry.names("rank")}
JUDGES = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Judge)}
SCORING = {name: cls for name, cls in JUDGES.items() if issubclass(cls, Scoring)}
COMPARABLE = {name: cls for name, cls in SCORING.items() if cls.comparable}
RETRIEVERS = {name: cls for name, cls in JUDGES.items() if issubclass(cls, Retriever)}
EMBEDDERS = {name: cls for name, cls in JUDGES.items() if issubclass(cls, Embedder)}
STRATEGIES = {name: cls for name, cls in CLASSES.items() if issubclass(cls, Strategy)}
SIZES = [0, 1, 2, 3, 9, 10, 11, 19, 20, 21, 25, 29, 30, 31, 40, 100, 257]


@dataclass(frozen=True)
class Oracle(Judge):
    """Scores a passage by the number it begins with, and notes the sizes of every batch."""

    comparable = True
    seen: list[list[int]] = field(default_factory=list, compare=False)

    def answers(self, asked: list[Asked], model: Any) -> list[Answer]:
        self.seen.append([len(a.passages) for a in asked])
        found = []
        for a in asked:
            score = torch.tensor([float(p.split()[0]) for p in a.passages])
            found.append(Answer(torch.argsort(score, descending=True, stable=True).tolist(), score))
        return found


@dataclass(frozen=True)
class Says(Judge):
    """Gives one fixed answer, whatever is asked."""

    comparable = True
    answer: Any = None

    def answers(self, asked: list[Asked], model: Any) -> list[Answer]:
        return [Answer(self.answer, torch.zeros(len(a.passages))) for a in asked]


def ranked(method, passages, model=None, query="q"):
    return order(method, [Asked(query, passages)], model)[0]


def test_every_method_is_one_or_the_other():
    assert set(JUDGES) ^ set(STRATEGIES) == set(CLASSES)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", SIZES)
def test_permutation_number_of_calls_and_longest_chain(name, n):
    judge = Oracle()
    strategy = STRATEGIES[name](judge=judge)
    grades = random.Random(n).choices(range(5), k=n)  # many equal ones, and equal passages
    assert sorted(ranked(strategy, [f"{g} text" for g in grades])) == list(range(n))
    assert sum(map(len, judge.seen)) == strategy.calls(n)
    assert len(judge.seen) == strategy.chain(n)
    assert (strategy.calls(n) == 0) == (n == 0)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("n", SIZES)
def test_a_perfect_judge_gives_the_promised_top(name, n):
    strategy = STRATEGIES[name](judge=Oracle())
    top = strategy.exact_top(n)
    assert min(1, n) <= top <= n
    for seed in range(5):
        grades = random.Random(seed).sample(range(1000), n)
        found = ranked(strategy, [f"{g} text" for g in grades])
        assert [grades[i] for i in found[:top]] == sorted(grades, reverse=True)[:top]


@pytest.mark.parametrize("name", STRATEGIES)
def test_many_queries_at_once_are_what_each_is_alone(name):
    shuffle = random.Random(3)
    lists = [[f"{g} text" for g in shuffle.sample(range(1000), n)] for n in (0, 1, 7, 33, 20, 55)]
    judge = Oracle()
    strategy = STRATEGIES[name](judge=judge)
    assert order(strategy, [Asked("q", passages) for passages in lists], None) == [ranked(strategy, passages) for passages in lists]


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("answer", [None, [], [0, 0], [0, 2], [1], [-1, 0], [0, 1, 2], ["0", "1"], "01", {0, 1}, 7, [0.0, 1.0], [0.5, 1]])
def test_an_answer_that_is_no_order_is_refused(name, answer):
    with pytest.raises(SmeltError, match=r"Says returned .* not an order of 2 passages"):
        ranked(STRATEGIES[name](judge=Says(answer)), ["a", "b"])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_holds_a_judge_and_one_that_suits_it(name):
    with pytest.raises(SmeltError, match="is no judge"):
        STRATEGIES[name](judge=7)
    if STRATEGIES[name].compares:
        for judge in JUDGES.values():
            if not judge.comparable:
                with pytest.raises(SmeltError, match="inside one call only"):
                    STRATEGIES[name](judge=judge())


PLACE = tempfile.TemporaryDirectory()
SMALL = Loaded(tiny("llama", context=2048), tiny_tokenizer(), None)


@pytest.fixture(scope="module")
def small():
    return SMALL


def made(cls):
    """The judge as it is by default; one with parameters of its own has them new, as before a training."""
    judge = cls()
    if isinstance(judge, Learns):
        torch.manual_seed(0)
        heads = judge.heads(SMALL.model.config)
        if heads is not None:
            folder = Path(PLACE.name) / registry.name_of(judge)[1]
            folder.mkdir(exist_ok=True)
            write(judge, heads, folder)
            return dataclasses.replace(judge, weights=str(folder))
    return judge


def texts(n):
    return [f"def f{i * i % 7}(x): return x + {i}" for i in range(n)]


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_gives_a_permutation_and_the_same_twice(name, small):
    judge = made(JUDGES[name])
    for n in [0, 1, 2, 7, judge.limit or 20]:
        found = ranked(judge, texts(n), small, "add to x")
        assert sorted(found) == list(range(n)) and all(type(i) is int for i in found)
        assert ranked(judge, texts(n), small, "add to x") == found


@pytest.mark.parametrize("name", JUDGES)
def test_asked_nothing_a_judge_says_whether_it_can_read_with_the_model(name, small):
    judge = made(JUDGES[name])
    assert list(judge.answers([], small)) == []
    try:
        ranked(judge, texts(3), None)
    except SmeltError as error:
        with pytest.raises(SmeltError, match=re.escape(str(error))):
            judge.answers([], None)


@pytest.mark.parametrize("name", SCORING)
def test_a_batch_scores_as_each_alone(name, small):
    judge = made(SCORING[name])
    asked = [Asked("add to x", texts(4)), Asked("a much longer query than the other one has", texts(7)[2:]), Asked("x", texts(2))]
    for together, one in zip(judge.scores(asked, small), asked, strict=True):
        alone = judge.scores([one], small)[0]
        assert together.shape == (len(one.passages),) and together.dtype in (torch.float32, torch.float64)
        torch.testing.assert_close(together, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", COMPARABLE)
def test_comparable_scores_do_not_depend_on_the_window_more_than_they_say(name, small):
    """`windowed` judges are only calibrated to compare; of the others a passage's score is the same in every company."""
    judge, passages = made(COMPARABLE[name]), texts(8)
    whole = judge.scores([Asked("add to x", passages)], small)[0]
    if getattr(judge, "windowed", False):
        assert torch.isfinite(whole).all()
        return
    parts = judge.scores([Asked("add to x", passages[5:]), Asked("add to x", passages[:5])], small)
    torch.testing.assert_close(torch.cat([parts[1], parts[0]]), whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", RETRIEVERS)
def test_a_search_is_the_sorted_scores(name, small):
    judge, passages = made(RETRIEVERS[name]), texts(9) + texts(9)[:2]  # two of them twice
    queries = ["add to x", "return f3"]
    found = judge.search(judge.index(passages, small), queries, 5, small)
    for query, best in zip(queries, found, strict=True):
        score = judge.scores([Asked(query, passages)], small)[0]
        wanted = torch.argsort(score, descending=True, stable=True).tolist()[: len(best)]
        assert len(best) <= 5 and [v for _, v in best] == sorted((v for _, v in best), reverse=True)
        torch.testing.assert_close(score[[i for i, _ in best]], score[wanted], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(torch.tensor([v for _, v in best], dtype=score.dtype), score[[i for i, _ in best]], atol=2e-5, rtol=1e-4)
    assert judge.search(judge.index([], small), queries, 5, small) == [[], []]


@pytest.mark.parametrize("name", EMBEDDERS)
def test_scores_are_products_of_embeddings(name, small):
    judge = made(EMBEDDERS[name])
    q, d = judge.embed(["add to x"], small, query=True), judge.embed(texts(5), small)
    assert q.dtype == d.dtype == torch.float32 and q.shape[0] == 1 and d.shape[0] == 5
    torch.testing.assert_close(judge.scores([Asked("add to x", texts(5))], small)[0], (d @ q[0]), atol=2e-5, rtol=1e-4)
    assert judge.embed([], small).shape == (0, d.shape[1])


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_says_what_it_cannot_take(name, small):
    judge = made(JUDGES[name])
    if judge.limit is not None:
        with pytest.raises(SmeltError, match=str(judge.limit)):
            ranked(judge, ["x"] * (judge.limit + 1), small)
        for cls in STRATEGIES.values():
            if "window" in cls.__dataclass_fields__ and (judge.comparable or not cls.compares):
                with pytest.raises(SmeltError, match=str(judge.limit)):
                    cls(judge=judge, window=judge.limit + 1)


@pytest.mark.parametrize("name", JUDGES)
def test_hostile_texts(name, small):
    """Empty and blank passages, an empty query, end-of-text tokens and identifiers in the text."""
    passages = ["", " \n\t", "<|endoftext|>", "[A] [B] [3]", "é数🙂\x00", "word " * 5000]
    for query in ("", "<|endoftext|>", "[A]", "long " * 5000):
        assert sorted(ranked(made(JUDGES[name]), passages, small, query)) == list(range(6))


@pytest.mark.parametrize("name", [name for name, cls in JUDGES.items() if issubclass(cls, Learns)])
def test_what_learns_reads_in_half_precision_when_the_training_says_so(name, small):
    """Losses near those of float32 and not the same: a judge that calls a part of the model is not left out."""
    judge = made(CLASSES[name])
    torch.manual_seed(0)
    heads = judge.heads(small.model.config)
    lists = [Labelled(f"query {i}", [f"right {i}", f"wrong {i} a", f"wrong {i} b"], [1.0, 0.0, 0.0]) for i in range(3)]
    if judge.copies:
        lists = [one._replace(vectors=torch.randn(4, small.model.config.hidden_size)) for one in lists]
    with torch.no_grad():
        batch = judge.collate(lists, small, 600)
        whole = judge.loss(small.model, heads, batch)
        with halved(small.model, True):
            half = judge.loss(small.model, heads, batch)
    assert half.dtype == whole.dtype == torch.float32
    assert not torch.equal(half, whole)
    torch.testing.assert_close(half, whole, rtol=0.1, atol=0.1)
