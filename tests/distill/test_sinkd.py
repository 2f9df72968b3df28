from __future__ import annotations

import itertools

import pytest
import torch

from smelt import registry
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.distill.sinkd import SinKD, _transport
from smelt.spec import SmeltError

V = 7


def pair(*shape, seed=0):
    made = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


def slow(student, teacher, temperature, epsilon, iterations):
    """(K, W) of one chunk, on probabilities, one pair at a time: rows of the teacher, columns of the student."""
    q, p = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    apart = torch.stack([torch.stack([(a - b).abs().sum() for b in q]) for a in p])
    k = torch.exp(-apart / epsilon)
    for _ in range(iterations):
        k = k / k.sum(1, keepdim=True)
        k = k / k.sum(0, keepdim=True)
    return k, apart


def sums(objective, student, teacher):
    return (objective(student, teacher) - objective.objective(student, teacher)) / objective.weight


def test_equals_the_slow_sum_chunk_by_chunk_the_last_one_shorter():
    student, teacher = pair(2, 7, V)
    got = sums(SinKD(rows=4, weight=0.5), student, teacher).flatten()
    for first in range(0, 14, 4):
        part = slice(first, min(14, first + 4))
        k, apart = slow(student.flatten(0, 1)[part], teacher.flatten(0, 1)[part], 2.0, 0.1, 20)
        torch.testing.assert_close(got[part], (k * apart).sum().expand(part.stop - part.start), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(k.sum(0), torch.ones(len(k), dtype=torch.float64), rtol=0, atol=1e-14)  # the columns


def test_the_objective_is_kept_and_its_weight_can_be_nothing():
    student, teacher = pair(6, V)
    assert torch.equal(SinKD(weight=0.0)(student, teacher), ForwardKL()(student, teacher))
    assert torch.equal(SinKD(objective=ReverseKL(), weight=0.0)(student, teacher), ReverseKL()(student, teacher))


def test_gradient_equals_the_numeric_one():
    student, teacher = pair(5, V)
    assert torch.autograd.gradcheck(lambda z: SinKD(weight=1.0, rows=3)(z, teacher), student.requires_grad_())


def test_the_sum_does_not_know_whose_prediction_is_whose():
    student, teacher = pair(8, V)
    plain = sums(SinKD(rows=8, weight=1.0), student, teacher)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(sums(SinKD(rows=8, weight=1.0), student[order], teacher), plain, rtol=0, atol=1e-12)
    assert not torch.allclose(sums(SinKD(rows=4, weight=1.0), student[order], teacher), plain)


def test_at_the_teacher_only_what_epsilon_spreads_is_left():
    student, _ = pair(8, V)
    spread = [sums(SinKD(rows=8, weight=1.0, epsilon=epsilon), student, student)[0].item() for epsilon in (0.3, 0.1, 0.03)]
    assert spread[0] > spread[1] > spread[2] > 0


def assignment(apart):
    return min(sum(apart[i, j].item() for i, j in enumerate(order)) for order in itertools.permutations(range(len(apart))))


def test_never_below_the_best_assignment_and_on_it_as_epsilon_goes_to_zero():
    for seed in range(5):
        student, teacher = pair(6, V, seed=seed)
        best = assignment(slow(student, teacher, 1.0, 1.0, 1)[1])
        q, p = student.softmax(-1), teacher.softmax(-1)
        values = [_transport(q, p, epsilon, 3000).item() for epsilon in (0.3, 0.1, 0.02)]
        assert values[0] >= values[1] >= values[2] >= best - 1e-9
        assert values[2] == pytest.approx(best, rel=0.02)


def test_equals_sinkhorn_of_pot():
    ot = pytest.importorskip("ot")
    student, teacher = pair(6, V)
    q, p = student.softmax(-1), teacher.softmax(-1)
    apart = torch.cdist(p, q, p=1.0).numpy()
    plan = ot.sinkhorn([1 / 6] * 6, [1 / 6] * 6, apart, reg=0.1, numItermax=100_000, stopThr=1e-13)
    assert _transport(q, p, 0.1, 2000).item() == pytest.approx(6 * (plan * apart).sum(), rel=1e-8)


def test_rows_nearly_sum_to_one_after_the_default_iterations():
    student, teacher = pair(8, 1000)
    k, _ = slow(student, teacher, 2.0, 0.1, 20)
    torch.testing.assert_close(k.sum(1), torch.ones(8, dtype=torch.float64), rtol=0, atol=0.02)


def test_far_apart_in_float32_nothing_underflows():
    student, teacher = torch.full((2, 4, 8), -100.0)
    student[:, :4] = 100 * torch.eye(4)
    teacher[:, 4:] = 100 * torch.eye(4)
    loss = SinKD(rows=4, weight=1.0, epsilon=0.01)
    z = student.clone().requires_grad_()
    value = sums(loss, z, teacher)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.full((4,), 8.0), rtol=1e-4, atol=0)  # every pair is 2 apart
    assert torch.isfinite(z.grad).all()


def test_no_position_or_one_is_taken_too():
    student, teacher = pair(V)
    assert sums(SinKD(weight=1.0), student, teacher).item() == pytest.approx(
        ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)).abs().sum().item()
    )
    assert SinKD()(torch.zeros(0, V), torch.zeros(0, V)).shape == (0,)


def test_only_a_token_divergence_is_held():
    assert registry.parse("sinkd(objective=reverse_kl())", "distill") == SinKD(objective=ReverseKL())
    assert registry.text(SinKD(objective=ReverseKL(), rows=8)) == "sinkd(objective=reverse_kl(), rows=8)"
    with pytest.raises(SmeltError, match="sinkd: objective is CrossEntropy, which reads student, labels"):
        SinKD(objective=CrossEntropy())
