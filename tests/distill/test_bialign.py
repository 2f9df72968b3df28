from __future__ import annotations

import itertools
import json

import pytest
import torch

from smelt.distill.bialign import BiAlign, _Both, ranking
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.reverse_kl import ReverseKL
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Course, Training


def slow(student, teacher, margin):
    """One pair at a time."""
    n, total = len(student), 0.0
    rank = [sum(other > own for other in teacher) for own in teacher]
    for i, j in itertools.permutations(range(n), 2):
        if teacher[i] > teacher[j]:
            total += max(0.0, student[j] - student[i] + margin * (rank[j] - rank[i]) / (n - 1))
    return total


def scores(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


def test_the_ranking_is_the_slow_sum_over_pairs():
    student, teacher = scores(20, 4)
    teacher[0, 1] = teacher[0, 3]  # equal ones are no pair
    got = ranking(student, teacher, 0.1)
    for value, *rows in zip(got.tolist(), student.tolist(), teacher.tolist(), strict=True):
        assert value == pytest.approx(slow(*rows, 0.1), rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: ranking(x, teacher, 0.1), student.requires_grad_())


def test_zero_at_the_teacher_without_margin_and_no_order_of_the_subsets():
    student, teacher = scores(20, 5)
    assert not ranking(teacher, teacher, 0.0).any()
    assert (ranking(teacher, teacher, 0.1) > 0).any()
    for order in ([4, 3, 2, 1, 0], [1, 4, 0, 2, 3]):
        torch.testing.assert_close(ranking(student[:, order], teacher[:, order], 0.1), ranking(student, teacher, 0.1))


def test_descent_on_the_scores_removes_every_inversion():
    student, teacher = scores(8, 4)
    student.requires_grad_()
    for _ in range(400):
        (slope,) = torch.autograd.grad(ranking(student, teacher, 0.1).sum(), student)
        student = (student - 0.05 * slope).detach().requires_grad_()
    assert torch.equal(student.argsort(-1), teacher.argsort(-1))


class Spy(Course):
    def fit(self, objective, *, rows=None, **more):
        self.kept = objective, rows
        return {}


def spied(method, folder, ids, settings):
    student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), folder)
    spy = Spy(student, (), None, settings, folder, seed=3)
    spy.rows = lambda: [{"input_ids": row[:-1], "labels": row[1:]} for row in ids]
    method.teach(spy)
    return spy


SETTINGS = Training(tokens=3 * 8 * 24, context=24, batch=8)


def batch_of(rows, step=0, size=8):
    found = [rows[step * size + i] for i in range(size)]
    return {name: torch.stack([row[name] for row in found]) for name in found[0]}


def test_the_step_is_divergence_on_all_tokens_and_the_mean_ranking_of_the_samples(tmp_path):
    method = BiAlign(subsets=3, least=2, most=3, weight=0.7, divergence=ReverseKL())
    ids = torch.randint(4, 300, (8, 25), generator=torch.Generator().manual_seed(1))
    spy = spied(method, tmp_path, ids, SETTINGS)
    objective, rows = spy.kept
    inputs = batch_of(rows, 1)
    keep, labels = inputs["labels"] != -100, inputs["labels"].clamp(min=0)
    made = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(8, 24, 320, generator=made, dtype=torch.float64) for _ in range(2))
    got = (
        torch.where(keep, objective(student=student, teacher=teacher, labels=labels, keep=keep, weights=inputs["weights"]), 0.0).sum()
        / keep.sum()
    )
    alike, ranked = [], []
    for start in (0, 4):
        assert torch.equal(inputs["input_ids"][start], ids[2 + start // 4][:-1]) and keep[start].all()
        alike += ReverseKL()(student[start], teacher[start]).tolist()
        both = []
        for logits in (student, teacher):
            log = [
                [logits[r, t].log_softmax(-1)[labels[r, t]].item() for t in range(24) if keep[r, t]] for r in range(start + 1, start + 4)
            ]
            both.append([sum(row) / len(row) for row in log])
        ranked.append(slow(*both, 0.1))
    assert got.item() == pytest.approx(sum(alike) / len(alike) + 0.7 * sum(ranked) / 2, rel=1e-6)  # weights are float32


def test_rows_of_a_sample_end_alike_and_have_different_demonstrations(tmp_path):
    ids = torch.arange(8 * 25).view(8, 25) + 4
    spy = spied(BiAlign(subsets=3, least=2, most=3), tmp_path, ids, SETTINGS)
    _, rows = spy.kept
    for start in (0, 4, 8, 20):
        whole, *others = [rows[start + i] for i in range(4)]
        answers = {tuple(row["labels"][row["labels"] != -100].tolist()) for row in others}
        (answer,) = answers
        assert tuple(whole["labels"][-len(answer) :].tolist()) == answer
        shown = set()
        for row in others:
            first = int((row["labels"] != -100).nonzero()[0, 0])
            text = row["input_ids"][: first + 1].tolist()
            assert text == sorted(text) and set(text) <= set(whole["input_ids"].tolist())  # pieces of the window, in its order
            shown.add(tuple(text))
        assert len(shown) == 3


def test_gradients_reach_what_was_weighed():
    method = BiAlign(subsets=2, least=2, most=3)
    labels = torch.randint(7, (3, 5), generator=torch.Generator().manual_seed(0))
    keep = torch.tensor([[1] * 5, [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]]).bool()
    student, teacher = scores(3, 5, 7)
    objective = _Both(method)
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)

    def loss(x):
        return torch.where(keep, objective(student=x, teacher=teacher, labels=labels, keep=keep, weights=weights), 0.0).sum()

    assert torch.autograd.gradcheck(loss, student.requires_grad_())
    (slope,) = torch.autograd.grad(loss(student), student)
    assert not slope[~keep].any() and slope[0].any()


def test_pairs_from_a_file_are_cut_to_what_fits(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"input": f"x{i}", "output": "y" * (1 + i % 3)}) for i in range(12)))
    settings = Training(tokens=3 * 8 * 40, context=40, batch=8)
    spy = spied(BiAlign(subsets=3, least=2, most=6, examples=str(file)), tmp_path, [], settings)
    _, rows = spy.kept
    text = tiny_tokenizer().decode(rows[0]["input_ids"])
    assert text.startswith("x") and text.count("\n\n") >= 2
    for i in range(24):
        kept = rows[i]["labels"][rows[i]["labels"] != -100]
        assert tiny_tokenizer().decode(kept).endswith("y\n\n")
    with pytest.raises(SmeltError, match="short enough"):
        spied(BiAlign(subsets=3, least=2, most=6, examples=str(file)), tmp_path, [], Training(tokens=8 * 8, context=8, batch=8))


def test_settings_that_will_not_do(tmp_path):
    for change, said in (
        ({"divergence": CrossEntropy()}, "a divergence of student and teacher alone"),
        ({"least": 5, "most": 4}, "least=5 is more than most=4"),
        ({"least": 2, "subsets": 4}, "2 demonstrations have 3 subsets"),
    ):
        with pytest.raises(SmeltError, match=said):
            BiAlign(**change)
    for settings, said in (
        (Training(tokens=96, context=24, batch=6), "batch=6"),
        (Training(tokens=96, context=24, batch=8, micro=2), "micro=2"),
    ):
        with pytest.raises(SmeltError, match=said):
            spied(BiAlign(subsets=3), tmp_path, [], settings)
    with pytest.raises(SmeltError, match="no room"):
        spied(BiAlign(subsets=3), tmp_path, [], Training(tokens=96, context=12, batch=8))
