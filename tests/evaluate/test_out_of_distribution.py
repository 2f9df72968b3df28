from __future__ import annotations

import itertools
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.data import Document
from smelt.data.stdlib import Stdlib
from smelt.evaluate import Variant
from smelt.evaluate._text import encode
from smelt.evaluate.out_of_distribution import OutOfDistribution, Pieces, Reference, aupr, auroc, far95
from smelt.runtime import bind
from smelt.spec import SmeltError

SMALL = OutOfDistribution(tokens=400, document=40, batch=3)


@dataclass(frozen=True)
class Lines:
    text: str = "return"

    def documents(self, split):
        if split == "test":
            yield Document("lines", f"{self.text}\n" * 200)

    def digest(self):
        return f"lines-{self.text}"


def slow_auroc(known, other):
    return sum(Fraction(2 * (y > x) + (y == x), 2) for x, y in itertools.product(known, other)) / (len(known) * len(other))


def slow_aupr(known, other):
    """Lower the threshold level by level; add precision times the step of recall."""
    total, before = Fraction(0), Fraction(0)
    for level in sorted({*known, *other}, reverse=True):
        right, wrong = sum(y >= level for y in other), sum(x >= level for x in known)
        recall = Fraction(right, len(other))
        total += (recall - before) * Fraction(right, right + wrong)
        before = recall
    return total


def slow_far95(known, other):
    passing = [level for level in sorted(set(known)) if 20 * sum(x <= level for x in known) >= 19 * len(known)]
    return Fraction(sum(y <= passing[0] for y in other), len(other))


def test_hand_computed_with_ties():
    known, other = np.array([1.0, 2.0, 2.0, 3.0]), np.array([2.0, 3.0, 4.0])
    # pairs: 2 beats 1 and ties twice (2), 3 beats three and ties once (3.5), 4 beats four (4), of 12
    assert auroc(known, other) == pytest.approx(9.5 / 12)
    # 4: recall 1/3, precision 1; 3: recall 2/3, precision 2/3; 2: recall 1, precision 3/6
    assert aupr(known, other) == pytest.approx((1 + 2 / 3 + 1 / 2) / 3)
    assert far95(known, other) == pytest.approx(2 / 3)  # all four known pass at 3, and so do 2 and 3
    assert far95(np.arange(20.0), np.array([18.0, 18.5, 30.0])) == pytest.approx(1 / 3)  # 19 of 20 pass at 18


@pytest.mark.parametrize("levels", [3, 1000])
def test_equals_the_slow_counts(levels):
    draw = np.random.default_rng(0)
    for n, m in ((1, 1), (5, 3), (19, 21), (40, 20), (41, 60)):
        known, other = draw.integers(levels, size=n) / 7, draw.integers(levels, size=m) / 7 + 0.1 * (levels > 3)
        for fast, slow in ((auroc, slow_auroc), (aupr, slow_aupr), (far95, slow_far95)):
            assert fast(known, other) == pytest.approx(float(slow(known.tolist(), other.tolist())), abs=1e-12), fast
        assert auroc(known, other) == pytest.approx(1 - auroc(other, known))


def test_the_ends():
    low, high, same = np.arange(20.0), np.arange(20.0) + 30, np.zeros(20)
    assert (auroc(low, high), aupr(low, high), far95(low, high)) == (1, 1, 0)
    assert (auroc(high, low), far95(high, low)) == (0, 1)
    assert (auroc(same, same), aupr(same, same), far95(same, same)) == (0.5, 0.5, 1)


@pytest.mark.parametrize("cached", [False, True])
def test_scores_are_mean_nats_of_each_piece(variant, cached):
    method = registry.load("cache", "sink_window").unlimited() if cached else None
    variant.cache = method
    with bind(variant.model, cache=method):
        scores = SMALL.scores(variant, variant.data)
    texts = {d.text for d in Pieces(variant.data, 160).documents("test")}
    expected = []
    for text in texts:
        ids = torch.tensor([encode(variant.tokenizer, text).ids])
        with torch.no_grad():
            logits = variant.model(input_ids=ids).logits[0, :-1].double()
        expected.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:])))
    for score in scores[:-1]:  # the last piece may be cut by the budget
        assert min(abs(score - e) for e in expected) < 1e-4
    assert len(set(scores.round(9))) == len(scores) > 5


def test_text_that_surprises_is_found_and_the_same_text_is_not(variant):
    def measured(corpus):
        return {m.name: m.value for m in OutOfDistribution(corpus=corpus, tokens=400, document=40)(variant)}

    assert measured(variant.data)["ood_auroc"] == pytest.approx(0.5)
    one = measured(Lines())
    scores = [SMALL.scores(variant, corpus) for corpus in (variant.data, Lines())]
    assert one == {"ood_auroc": auroc(*scores), "ood_aupr": aupr(*scores), "ood_far95": far95(*scores)}


def test_pieces_are_whole_lines_of_the_text_in_order():
    class Two:
        def documents(self, split):
            yield Document("a", "one\ntwo\nthree\nfour\n")
            yield Document("b", "x" * 25 + "\nend\n")

    found = list(Pieces(Two(), 10).documents("test"))
    assert [d.text for d in found] == ["one\ntwo\n", "three\n", "x" * 10, "x" * 10, "x" * 5 + "\nend\n"]
    assert [d.name for d in found] == ["a#0", "a#1", "b#0", "b#1", "b#2"]


def test_the_reference_is_prose_that_stdlib_does_not_hold():
    found = list(Reference().documents("test"))
    assert not list(Reference().documents("train"))
    pieces = list(Pieces(Reference(), 256).documents("test"))
    assert len(found) > 40 and len(pieces) > 400
    known = "\n".join(" ".join(d.text.split()) for d in Stdlib().documents("test"))
    assert sum(" ".join(p.text.split()) in known for p in pieces[:200]) == 0


def test_a_recipe_may_name_a_corpus(tmp_path):
    (tmp_path / "prose.txt").write_text("words\n" * 50)
    made = registry.parse(f"out_of_distribution(corpus=files(path='{tmp_path}', test=0.99, validation=0.0))", "evaluate")
    assert registry.parse(registry.text(made), "evaluate") == made
    with pytest.raises(SmeltError, match="corpus"):
        registry.parse("out_of_distribution(corpus=3)", "evaluate")


def test_a_text_without_a_piece_is_refused(variant):
    with pytest.raises(SmeltError, match="nothing to"):
        OutOfDistribution(corpus=Lines("\t"))(Variant("v", variant.model, variant.tokenizer, data=variant.data))
