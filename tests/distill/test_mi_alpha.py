from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.mi_alpha import MIAlpha, bound
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

ALPHAS = (0.0, 0.01, 0.5, 1.0)


def loaded(**sizes):
    return Loaded(tiny(**sizes), tiny_tokenizer(), None)


def slow(f, q, alpha):
    """One pair at a time, from the definition."""
    count = len(f)
    joint = apart = 0.0
    for j in range(count):
        m = sum(math.exp(f[k][j]) for k in range(count)) / count
        joint += math.log(math.exp(f[j][j]) / (alpha * m + (1 - alpha) * math.exp(q[j]))) / count
        others = [k for k in range(count) if k != j]
        m = sum(math.exp(f[k][j]) for k in others) / len(others)
        apart += sum(math.exp(f[k][j]) / (alpha * m + (1 - alpha) * math.exp(q[j])) for k in others) / len(others) / count
    return 1 + joint - apart


@pytest.mark.parametrize("alpha", ALPHAS)
def test_equals_the_slow_sum_and_its_gradient(alpha):
    f, q = torch.randn(3, 5, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    got = bound(f, q, alpha)
    for i in range(3):
        assert got[i].item() == pytest.approx(slow(f[i].tolist(), q[i].tolist(), alpha), rel=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: bound(a, b, alpha), (f.requires_grad_(), q.requires_grad_()))


def gaussian(sets, count, rho, seed=0):
    """(f, q) of the critic that knows: f = log p(y | x) / p(y), q = 0."""
    made = torch.Generator().manual_seed(seed)
    x, e = (torch.randn(sets, count, generator=made, dtype=torch.float64) for _ in range(2))
    y = rho * x + math.sqrt(1 - rho**2) * e
    x, y = x[:, :, None], y[:, None, :]
    f = -0.5 * math.log(1 - rho**2) - (y - rho * x) ** 2 / (2 * (1 - rho**2)) + y**2 / 2
    return f, torch.zeros(sets, count, dtype=torch.float64)


def test_a_gaussian_pair_with_the_best_critic():
    rho, count = 0.9, 64
    truth = -0.5 * math.log(1 - rho**2)  # 0.830
    f, q = gaussian(2000, count, rho)
    found = {alpha: bound(f, q, alpha) for alpha in ALPHAS}
    for alpha in (0.0, 0.01):
        error = found[alpha].std() / math.sqrt(2000)
        assert abs(found[alpha].mean() - truth) < 4 * error + 0.01 * (alpha > 0), alpha
    for alpha in (0.5, 1.0):  # the mean of K ratios is not their expectation: below by about its variance / 2 at most
        ratio = 1 / (1 - rho**2)  # E_joint p(y|x)/p(y) = E_apart of its square
        assert truth - 1.5 * (ratio - 1) / count < found[alpha].mean() < truth + 0.01, alpha
    spreads = [found[alpha].std().item() for alpha in ALPHAS]
    assert spreads == sorted(spreads, reverse=True)


def test_info_nce_is_at_most_log_k():
    for scale in (1, 10, 1000):
        f, q = scale * torch.randn(50, 8, 8), torch.randn(50, 8)
        assert (bound(f, q, 1.0) <= math.log(8) + 1e-5).all()
    sure = torch.full((8, 8), -50.0).fill_diagonal_(50.0)
    assert bound(sure, torch.zeros(8), 1.0).item() == pytest.approx(math.log(8))
    assert bound(sure / 10, torch.zeros(8), 0.0) > math.log(8)


def test_sets_hold_distant_positions_and_the_last_few_are_left_out():
    method = MIAlpha(group=3, width=4)
    equipment = method.equipment(loaded(hidden=16, heads=2, kv_heads=1), loaded(hidden=8, heads=2, kv_heads=1)).double()
    x, y = torch.randn(1, 9, 16, dtype=torch.float64), torch.randn(1, 9, 8, dtype=torch.float64)
    keep = torch.ones(1, 9, dtype=torch.bool)
    keep[0, 4] = False  # 8 are kept: two sets of 3, the last two are left out
    got = method((x,), (y,), keep, equipment)
    assert got.shape == (1, 9) and (got == got[0, 0]).all()
    sets = []
    for places in ((0, 2, 5), (1, 3, 6)):
        f, q = equipment(x[0, list(places)], y[0, list(places)])
        sets.append(slow(f.tolist(), q.tolist(), 0.5))
    assert got[0, 0].item() == pytest.approx(-sum(sets) / 2, rel=1e-12)
    few = keep & (torch.arange(9) < 2)
    f, q = equipment(x[0, :2], y[0, :2])
    assert method((x,), (y,), few, equipment)[0, 0].item() == pytest.approx(-slow(f.tolist(), q.tolist(), 0.5), rel=1e-12)
    for kept in (0, 1):
        assert not method((x,), (y,), keep & (torch.arange(9) < kept), equipment).any()


def test_student_and_critics_learn_and_the_teacher_does_not():
    torch.manual_seed(0)
    method = MIAlpha(group=16, width=16)
    equipment = method.equipment(loaded(hidden=16, heads=2, kv_heads=1), loaded(hidden=16, heads=2, kv_heads=1))
    teacher = torch.randn(2, 64, 16, requires_grad=True)
    student = (0.1 * torch.randn(2, 64, 16)).requires_grad_()
    keep = torch.ones(2, 64, dtype=torch.bool)
    optimizer = torch.optim.Adam([student, *equipment.parameters()], lr=1e-2)
    losses = []
    for _ in range(150):
        optimizer.zero_grad()
        loss = method((student,), (teacher,), keep, equipment)[0, 0]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert teacher.grad is None and all(p.grad is not None for p in equipment.parameters())
    assert losses[-1] < -1.0 < losses[0]


def test_without_a_baseline_there_are_no_idle_parameters():
    one = loaded()
    assert MIAlpha(alpha=1.0).equipment(one, one).q is None and MIAlpha().equipment(one, one).q is not None


@pytest.mark.parametrize(
    ("method", "said"), [(MIAlpha(student_layer=3), "student has 0 .* to 2"), (MIAlpha(teacher_layer=-5), "teacher has 0 .* to 3")]
)
def test_a_layer_that_is_not_there_is_refused(method, said):
    with pytest.raises(SmeltError, match=said):
        method.equipment(loaded(layers=2), loaded(layers=3))
    with pytest.raises(SmeltError, match="needs a teacher"):
        method.equipment(loaded(), None)
