from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.evaluate import _beside
from smelt.evaluate._score import windows
from smelt.evaluate._text import choose, encode
from smelt.evaluate.agreement import Agreement
from smelt.evaluate.loyalty import Loyalty, _correlation, _metrics, _ranks, compare
from smelt.model._load import Loaded
from smelt.model._tiny import tiny_tokenizer
from smelt.runtime import bind
from smelt.spec import SmeltError

SMALL = Loyalty(tokens=160, document=60, context=40, stride=16, batch=3, prefill=16, chunk=8)
SAME = Agreement(tokens=160, document=60, context=40, stride=16, batch=3, prefill=16, chunk=8)


def distance(p, q):
    """sqrt of the Jensen-Shannon divergence in bits, one token at a time."""
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    far = [sum(a * math.log2(a / c) for a, c in zip(side, m, strict=True) if a > 0) for side in (p, q)]
    return math.sqrt(sum(far) / 2)


def slow(variant):
    """[label, probability, y teacher, y variant] of each document."""
    found = []
    for document in choose(variant.data, SMALL.tokens, SMALL.document):
        ids = encode(variant.tokenizer, document.text).ids
        rows = []
        for first, last, done in windows(len(ids), SMALL.context, SMALL.stride):
            with torch.no_grad():
                row = torch.tensor([ids[first:last]])
                p, q = (m(input_ids=row).logits[0].double().softmax(-1) for m in (variant.teacher.model, variant.model))
            for at in range(done - first - 1, last - first):
                word = ids[first + at + 1]
                label = float(p[at].argmax() == q[at].argmax())
                rows.append((label, 1 - distance(p[at].tolist(), q[at].tolist()), math.log(p[at, word]), math.log(q[at, word])))
        assert len(rows) == len(ids) - 1
        found.append(np.array(rows).T)
    return found


@pytest.mark.parametrize("kept", [1 << 29, 0])
def test_equals_a_slow_loop(variant, monkeypatch, kept):
    monkeypatch.setattr(_beside, "KEPT", kept)
    label, probability, regression, pearson, spearman = SMALL(variant)
    found = slow(variant)
    every = np.concatenate(found, axis=1)
    width = every[2].max() - every[2].min()
    assert list(label.samples) == [part[0].sum() for part in found]
    np.testing.assert_allclose(probability.samples, [part[1].sum() for part in found], rtol=1e-4)
    expected = [sum(max(0.0, 1 - abs(a - b) / width) for a, b in zip(part[2], part[3])) for part in found]
    np.testing.assert_allclose(regression.samples, expected, rtol=1e-4)
    assert pearson.value == pytest.approx(np.corrcoef(every[2], every[3])[0, 1], rel=1e-4)
    order = [np.array([(side < y).sum() + ((side == y).sum() + 1) / 2 for y in side]) for side in every[2:]]
    assert spearman.value == pytest.approx(np.corrcoef(*order)[0, 1], abs=1e-3)
    assert list(label.weights) == [part.shape[1] for part in found] == list(probability.weights)


def test_label_loyalty_is_top1_agreement_and_the_teacher_is_asked_once_for_both(variant):
    calls = []
    assert SAME(variant)[1].value == SMALL(variant)[0].value
    handle = variant.teacher.model.register_forward_hook(lambda *_: calls.append(1))
    SMALL(variant)
    SAME(variant)
    handle.remove()
    assert not calls


def test_a_model_is_wholly_loyal_to_itself(variant):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    assert [m.value for m in SMALL(variant)][:3] == [1.0, 1.0, 1.0]
    assert [m.value for m in SMALL(variant)][3:] == pytest.approx([1.0, 1.0])


def test_probability_loyalty_at_its_ends_and_between():
    z = torch.randn(50, 7)
    next_ids = torch.zeros(50, dtype=torch.long)
    assert (compare(z, z + 3, next_ids)[1] > 1 - 1e-3).all()
    assert (compare(30 * z, 30 * z.clone(), next_ids)[1] == 1).all()
    ruled = torch.arange(7) < 3
    apart = compare(z.masked_fill(ruled, -math.inf), z.masked_fill(~ruled, -math.inf), next_ids)
    torch.testing.assert_close(apart[1], torch.zeros(50, dtype=torch.float64), atol=1e-6, rtol=0)
    assert not apart[0].any()
    for scale in (0.01, 1.0, 100.0):
        a, b = scale * z, scale * z.flip(0)
        got = compare(a, b, next_ids)[1]
        expected = [1 - distance(p.tolist(), q.tolist()) for p, q in zip(a.double().softmax(-1), b.double().softmax(-1))]
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), atol=2e-5, rtol=0)
        torch.testing.assert_close(got, compare(b, a, next_ids)[1])  # the divergence has no direction


def test_loyalty_to_a_teacher_that_is_always_right_is_accuracy():
    draw = torch.Generator().manual_seed(0)
    student, gold = torch.randn(80, 5, generator=draw), torch.randint(5, (80,), generator=draw)
    teacher = 50.0 * torch.nn.functional.one_hot(gold, 5)
    assert compare(teacher, student, gold)[0].mean() == (student.argmax(-1) == gold).double().mean()


def test_regression_loyalty_by_hand():
    label = np.ones((2, 4))
    found = [np.vstack([label, [[-1.0, -2, -3, -5], [-1, -3, -3, -12]]])]
    _, _, regression, pearson, spearman = _metrics(found)
    assert regression.value == pytest.approx((1 + 0.75 + 1 + 0) / 4)  # a range of 4; the last is off by more than that
    assert pearson.value == pytest.approx(np.corrcoef(*found[0][2:])[0, 1])
    assert spearman.value == pytest.approx(np.corrcoef([4, 3, 2, 1], [4, 2.5, 2.5, 1])[0, 1])
    same = np.array([0.5, 0.5])
    assert _correlation(same, same) == 1 and _correlation(same, np.array([0.0, 1.0])) == 0
    np.testing.assert_array_equal(_ranks(np.array([3.0, 1.0, 3.0, 2.0])), [3.5, 1, 3.5, 2])
    one = [np.array([[1.0], [1.0], [-2.0], [-2.0]])]
    assert _metrics(one)[2].value == 1


def test_reads_the_variant_through_its_cache(variant):
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    cls = registry.load("cache", "kivi")
    for method, lossy in ((cls.unlimited(), False), (cls.example(), True)):
        variant.cache = method
        with bind(variant.model, cache=method):
            assert (SMALL(variant)[1].value < 1 - 1e-3) == lossy


def test_what_cannot_be_measured_is_refused(variant):
    variant.attention = registry.load("attention", registry.names("attention")[0])()
    teacher = variant.teacher
    variant.teacher = Loaded(variant.model, variant.tokenizer, Path())
    with pytest.raises(SmeltError, match="load the teacher apart"):
        SMALL(variant)
    variant.teacher = None
    with pytest.raises(SmeltError, match="needs a teacher"):
        SMALL(variant)
    variant.teacher = teacher._replace(tokenizer=tiny_tokenizer(300))
    with pytest.raises(SmeltError, match="do not share a tokenizer"):
        SMALL(variant)
    with pytest.raises(SmeltError, match="stride=65"):
        Loyalty(context=64, stride=65)
