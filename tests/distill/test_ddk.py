from __future__ import annotations

import copy
import inspect
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.data._tokens import tokenize
from smelt.data.files import Files
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.ddk import DDK, _Drawn, _updated
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Course, Training

SIZES = {"layers": 1, "hidden": 16, "ffn": 24, "heads": 2, "kv_heads": 1}


def slow(r, student, teacher, alpha):
    psi = [a * math.exp(math.exp(s) / math.exp(t)) for a, s, t in zip(r, student, teacher, strict=True)]
    return [alpha * x / sum(psi) + (1 - alpha) / len(r) for x in psi]


# the update


def test_the_update_equals_the_formula():
    draw = np.random.default_rng(0)
    for alpha in (0.0, 0.3, 0.5, 1.0):
        r, student, teacher = draw.dirichlet(np.ones(7)), draw.uniform(0, 3, 7), draw.uniform(1, 3, 7)
        got = _updated(list(r), list(student), list(teacher), alpha)
        np.testing.assert_allclose(got, slow(r, student, teacher, alpha), rtol=1e-12)
        assert sum(got) == pytest.approx(1) and min(got) >= (1 - alpha) / 7 - 1e-15


def test_equal_models_go_to_uniform_at_the_rate_alpha():
    r, alpha, same = [0.7, 0.2, 0.1], 0.5, [2.0, 3.0, 4.0]
    far = [x - 1 / 3 for x in r]
    for step in range(1, 6):
        r = _updated(r, same, same, alpha)
        np.testing.assert_allclose([x - 1 / 3 for x in r], [alpha**step * x for x in far], atol=1e-15)


def test_the_stationary_point_is_the_root_of_its_quadratic():
    """N = 10 domains, one with a ratio of 1.5 and nine with 1: x = alpha e x / (e x + 1 - x) + (1 - alpha) / N, e = exp(0.5)."""
    n, alpha = 10, 0.5
    student, r = [math.log(1.5)] + [0.0] * (n - 1), [1 / n] * n
    for _ in range(200):
        r = _updated(r, student, [0.0] * n, alpha)
    e, c = math.exp(0.5), (1 - alpha) / n
    root = max(np.roots([e - 1, 1 - alpha * e - c * (e - 1), -c]))
    assert r[0] == pytest.approx(root, rel=1e-9) and round(r[0], 4) == 0.1884
    np.testing.assert_allclose(r[1:], (1 - root) / (n - 1))


def test_alpha_zero_is_uniform_and_a_hopeless_student_overflows_nothing():
    assert _updated([0.9, 0.1], [9.0, 1.0], [1.0, 1.0], 0.0) == [0.5, 0.5]
    np.testing.assert_allclose(_updated([0.5, 0.5], [1e4, 8.0], [1.0, 1.0], 0.5), [0.75, 0.25])
    np.testing.assert_allclose(_updated([0.5, 0.5], [math.log(100), 0.0], [0.0, 0.0], 0.5), [0.75, 0.25])  # exp(100) beside e


# the rows


class Numbered:
    """Row k of domain d is [d, k]."""

    def __init__(self, domain):
        self.domain = domain

    def __getitem__(self, k):
        return {"input_ids": torch.tensor([self.domain, k])}


def test_rows_follow_from_the_journal_in_any_order_and_none_is_skipped():
    journal = {"r0": {"r": [0.7, 0.2, 0.1]}, "r1": {"r": [0.0, 0.5, 0.5]}, "r2": {"r": [1.0, 0.0, 0.0]}}
    block, count = 400, 1100
    drawn = _Drawn([Numbered(d) for d in range(3)], journal, block, count, seed=5)
    rows = [tuple(drawn[i]["input_ids"].tolist()) for i in range(count)]
    assert len(drawn) == count and [int(drawn[i]["row"]) for i in (0, 399, 400)] == [0, 399, 400]
    for domain in range(3):
        places = [k for d, k in rows if d == domain]
        assert places == list(range(len(places)))  # each row of a domain in its turn
    shares = np.bincount([d for d, _ in rows[:block]], minlength=3) / block
    np.testing.assert_allclose(shares, journal["r0"]["r"], atol=4 * math.sqrt(0.25 / block))
    assert all(d != 0 for d, _ in rows[block : 2 * block]) and all(d == 0 for d, _ in rows[2 * block :])
    again = _Drawn([Numbered(d) for d in range(3)], journal, block, count, seed=5)
    assert [tuple(again[i]["input_ids"].tolist()) for i in (1000, 3, 700)] == [rows[i] for i in (1000, 3, 700)]
    other = _Drawn([Numbered(d) for d in range(3)], journal, block, count, seed=6)
    assert [tuple(other[i]["input_ids"].tolist()) for i in range(block)] != rows[:block]


def test_a_row_is_never_drawn_before_its_probabilities_are_known():
    drawn = _Drawn([Numbered(0)], {"r0": {"r": [1.0]}}, 4, 12, seed=0)
    assert drawn[3] and len(drawn.plans) == 1
    with pytest.raises(KeyError):
        drawn[4]


# the procedure


class _Plain:
    def __call__(self, student, teacher, labels):
        return CrossEntropy()(student, labels) + ForwardKL()(student, teacher)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    for index, file in enumerate(sorted(Path(inspect.__file__).parent.glob("*.py"))[:12]):
        (place / f"{index}.txt").write_text(file.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    for index in range(12):
        (place / f"bytes{index}.log").write_text(" ".join(str((index * 7919 + i * i) % 97) for i in range(800)))
    return place


def course(folder, place, steps=6, teacher=True, cached=None):
    corpus = Files(str(folder / "*"), validation=0.2, test=0.0)
    student = Loaded(tiny(**SIZES), tiny_tokenizer(), place)
    other = Loaded(tiny(**SIZES, seed=7), tiny_tokenizer(), place)
    settings = Training(data=corpus, tokens=steps * 4 * 32, context=32, batch=4, lr=1e-2, micro=1, teacher=cached or {"model": "base"})
    tokens = tokenize(corpus, "train", tiny_tokenizer(), place / "tokens")
    return Course(student, (other,) if teacher else (), tokens, settings, place / "course", seed=3, store=True)


def test_probabilities_are_those_of_the_measured_perplexities(folder, tmp_path):
    method = DDK(
        domains=(f"files(path={str(folder)!r}, validation=0.4)", Files(str(folder / "*.log"), validation=0.4)), every=3, rows=4, alpha=0.7
    )
    work = course(folder, tmp_path, steps=7)
    start = Loaded(copy.deepcopy(work.student.model), work.student.tokenizer, work.student.folder)
    done = method.teach(work)
    held = [work.read(Files(str(folder / kind), validation=0.4), "validation") for kind in ("", "*.log")]
    teacher = [work.loss(work.teacher, text, 4) for text in held]
    student = [work.loss(start, text, 4) for text in held]
    history = done["domains"]["history"]
    assert done["domains"]["teacher"] == teacher and history[0]["student"] == student
    assert len(history) == 3  # before all, and for steps 4 to 6 and 7
    r = [0.5, 0.5]
    for entry in history:
        r = slow(r, entry["student"], teacher, 0.7)
        np.testing.assert_allclose(entry["r"], r, rtol=1e-10)
    assert history[1]["student"] != student and len(done["log"]) == 7


def test_without_domains_the_text_is_cut_into_parts_with_held_out_ends(folder, tmp_path):
    work = course(folder, tmp_path)
    train, held = DDK(parts=3, rows=4)._texts(work)
    assert len(train) == len(held) == 3
    np.testing.assert_array_equal(np.concatenate([part.ids for pair in zip(train, held) for part in pair]), work.tokens.ids)
    starts = set(work.tokens.starts.tolist())
    at = 0
    for seen, kept in zip(train, held):
        assert at in starts
        expected = [s - at for s in sorted(starts) if at < s < at + len(seen)]
        assert seen.starts.tolist() == [0, *expected, len(seen)]
        at += len(seen) + len(kept)
        assert len(kept) == max(33, min(4 * 32 + 1, (len(seen) + len(kept)) // 10))
    with pytest.raises(SmeltError, match="too short"):
        DDK(parts=2000)._texts(work)


def test_the_weights_are_those_of_a_plain_training_on_the_rows_drawn(folder, tmp_path):
    work = course(folder, tmp_path / "a")
    DDK(parts=2, every=2, rows=4).teach(work)
    again = course(folder, tmp_path / "b")
    train, _ = DDK(parts=2, rows=4)._texts(again)
    rows = _Drawn([again.rows(text) for text in train], work.journal("ddk"), 8, 24, 3)
    again.fit(_Plain(), rows=rows)
    for a, b in zip(work.student.model.parameters(), again.student.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_is_refused(folder, tmp_path, monkeypatch):
    for text, why in (
        ("ddk(every=1)", "every"),
        ("ddk(alpha=1.5)", "alpha"),
        ("ddk(objective=3)", "int is no objective"),
        ("ddk(objective=ensemble())", "several teachers"),
        ("ddk(objective=ddk())", "DDK is no objective"),
        ("ddk(domains=[forward_kl()])", "is not a corpus"),
        ("ddk(domains=['stdlb()'])", "stdlib"),
    ):
        with pytest.raises(SmeltError, match=why):
            registry.parse(text, "distill")
    with pytest.raises(SmeltError, match="one teacher"):
        DDK().teach(course(folder, tmp_path, teacher=False))
    with pytest.raises(SmeltError, match="cached"):
        DDK().teach(course(folder, tmp_path, cached={"model": "base", "cache": "topk(k=4)"}))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SmeltError, match="one process"):
        DDK().teach(course(folder, tmp_path))


def test_it_is_what_its_recipe_text_says():
    method = registry.parse("ddk(domains=[stdlib(), 'notes/*.md'], every=8, objective=forward_kl(temperature=2.0))", "distill")
    assert registry.parse(registry.text(method), "distill") == method and len(method.domains) == 2
