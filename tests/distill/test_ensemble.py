from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from smelt import registry
from smelt.distill import Stateful
from smelt.distill.ensemble import Ensemble
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.spec import SmeltError

K, V = 3, 11
WEIGHTS = ("uniform", "inverse_entropy", "label_confidence", "majority", (0.5, 2.0, 0.0))


def made(*shape, seed=0, dtype=torch.float64):
    """(student, teachers, labels)"""
    draw = torch.Generator().manual_seed(seed)
    student, *teachers = (2 * torch.randn(*shape, V, generator=draw, dtype=dtype) for _ in range(K + 1))
    return student, tuple(teachers), torch.randint(V, shape, generator=draw)


def slow(teachers, label, mean, weights):
    """One position: the averaged distribution, one token at a time."""
    p = [[math.exp(z) / sum(map(math.exp, row.tolist())) for z in row.tolist()] for row in teachers]
    first = [row.index(max(row)) for row in p]
    votes = [first.count(choice) for choice in first]
    w = {
        "uniform": [1.0] * K,
        "inverse_entropy": [math.exp(sum(x * math.log(x) for x in row)) for row in p],
        "label_confidence": [row[label] for row in p],
        "majority": [float(n == max(votes)) for n in votes],
    }.get(weights, weights)
    w = [x / sum(w) for x in w]
    if mean == "arithmetic":
        return [sum(w[k] * p[k][v] for k in range(K)) for v in range(V)], w
    product = [math.prod(p[k][v] ** w[k] for k in range(K)) for v in range(V)]
    return [x / sum(product) for x in product], w


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_equals_the_slow_average(mean, weights):
    student, teachers, labels = made(2, 40)
    teachers = (teachers[0], teachers[1], 0.4 * teachers[0] + 0.6 * teachers[2])  # so that some majorities exist
    method = Ensemble(mean=mean, weights=weights)
    got = method._average(teachers, labels).softmax(-1)
    loss = method(teachers=teachers, student=student, labels=labels)
    shares = set()
    for i in range(2):
        for t in range(40):
            expected, w = slow([z[i, t] for z in teachers], int(labels[i, t]), mean, weights)
            torch.testing.assert_close(got[i, t], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=0)
            q = student[i, t].softmax(-1).tolist()
            assert loss[i, t].item() == pytest.approx(sum(a * math.log(a / b) for a, b in zip(expected, q, strict=True)), abs=1e-10)
            shares.add(tuple(round(x, 3) for x in w))
    assert len(shares) > (20 if weights in WEIGHTS[1:3] else 1 if weights == "majority" else 0)


@pytest.mark.parametrize("objective", [ForwardKL(temperature=2.0), ReverseKL()])
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_teachers_are_that_teacher_bit_for_bit(objective, mean, weights, dtype):
    student, (teacher, *_), labels = made(2, 5, dtype=dtype)
    for given in (teacher, 30 * teacher + 7):
        student = student.detach().requires_grad_()
        loss = Ensemble(objective, mean, weights)(teachers=(given,) * K, student=student, labels=labels)
        alone = objective(student, given)
        assert torch.equal(loss, alone)
        gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (loss, alone)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("mean", ["arithmetic", "geometric"])
def test_its_loss_is_at_most_the_mean_loss_of_its_members(mean, weights):
    """Jensen: exact at every position for the weights in force, hence for the plain mean when they are uniform."""
    _, teachers, labels = made(400)
    method = Ensemble(mean=mean, weights=weights)
    each = torch.stack([torch.nn.functional.cross_entropy(z, labels, reduction="none") for z in teachers])
    log_p = torch.stack([z.log_softmax(-1) for z in teachers])
    together = torch.nn.functional.cross_entropy(method._average(teachers, labels), labels, reduction="none")
    heard = [k for k in range(K) if k not in method.silent]
    log_p, counted = log_p[heard], each[heard]
    w = method._log_weights(log_p, labels).exp()
    torch.testing.assert_close(w.sum(0), torch.ones(400, dtype=torch.float64))
    assert (together <= (w * counted).sum(0) + 1e-12).all()
    if weights in ("uniform", "label_confidence"):  # likelier members count more
        assert (together <= each.mean(0) + 1e-12).all()
    if isinstance(weights, str) and weights != "majority":
        assert (together < each.mean(0)).float().mean() > 0.5


def test_the_slices_of_positions_do_not_show():
    wide = 1 << 14  # 16 positions are a slice
    draw = torch.Generator().manual_seed(0)
    teachers = tuple(torch.randn(40, wide, generator=draw) for _ in range(2))
    expected = torch.stack([z.softmax(-1) for z in teachers]).mean(0).log()
    torch.testing.assert_close(Ensemble()._average(teachers, None), expected, rtol=0, atol=1e-5)


def test_a_token_that_a_teacher_rules_out():
    _, teachers, labels = made(6)
    ruled = (teachers[0].masked_fill(torch.arange(V) < 2, -math.inf), *teachers[1:])
    p = [z.softmax(-1) for z in ruled]
    torch.testing.assert_close(Ensemble()._average(ruled, labels).exp(), sum(p) / K)
    assert not Ensemble(mean="geometric")._average(ruled, labels).softmax(-1)[:, :2].any()  # one veto is enough
    without = Ensemble(mean="geometric", weights=(0.0, 1.0, 0.0))._average(ruled, labels)
    torch.testing.assert_close(without.softmax(-1), p[1])  # unless it has no weight
    confident = Ensemble(weights="label_confidence")._average((ruled[0], ruled[0] + 1, ruled[0] - 1), torch.zeros_like(labels))
    torch.testing.assert_close(confident.softmax(-1), p[0])


def test_no_gradient_reaches_a_teacher_and_the_students_is_right():
    student, teachers, labels = made(3)
    for z in teachers:
        z.requires_grad_()
    method = Ensemble(mean="geometric", weights="inverse_entropy")
    method(teachers=teachers, student=student.requires_grad_(), labels=labels).sum().backward()
    assert all(z.grad is None for z in teachers)
    assert torch.autograd.gradcheck(lambda z: method(teachers=teachers, student=z, labels=labels), student.detach().requires_grad_())


def test_state_and_parameters_are_those_of_the_objective_it_holds():
    @dataclass(frozen=True)
    class Scaled(Stateful):
        def __call__(self, student, teacher, equipment):
            return equipment.scale * ForwardKL()(student, teacher)

        def equipment(self, student, teacher):
            made = torch.nn.Module()
            made.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
            return made

        def after(self, equipment, loss, progress):
            equipment.scale += loss

    student, teachers, _ = made(3)
    method, plain = Ensemble(Scaled()), Ensemble()
    equipment = method.equipment(None, None)
    method.after(equipment, 0.5, 0.1)
    got = method(student=student, teachers=teachers, equipment=equipment)
    torch.testing.assert_close(got, 2.5 * plain(student=student, teachers=teachers))
    empty = plain.equipment(None, None)
    plain.after(empty, 1.0, 0.0)
    assert empty is None


def test_reads_what_its_objective_reads():
    assert Ensemble().reads == ("teachers", "student")
    assert Ensemble(weights="label_confidence").reads == ("teachers", "student", "labels")


@pytest.mark.parametrize(
    "text, why",
    [
        ("ensemble(objective=cross_entropy())", "reads no teacher"),
        ("ensemble(objective=ensemble())", "reads no teacher"),
        ("ensemble(objective=3)", "is no objective"),
        ("ensemble(weights=(0.0, 0.0))", "positive sum"),
        ("ensemble(weights=(1.0, -1.0))", "numbers from 0"),
        ("ensemble(weights='uniformly')", "weights"),
        ("ensemble(mean='harmonic')", "geometric"),
    ],
)
def test_what_cannot_be_is_refused(text, why):
    with pytest.raises(SmeltError, match=why):
        registry.parse(text, "distill")


def test_weights_must_be_as_many_as_the_teachers():
    student, teachers, _ = made(2)
    with pytest.raises(SmeltError, match="2 weights for 3 teachers"):
        Ensemble(weights=(1.0, 1.0))(teachers=teachers, student=student)
    assert registry.parse("ensemble(weights=[1, 0])", "distill") == Ensemble(weights=(1.0, 0.0))
