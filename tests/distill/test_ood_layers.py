from __future__ import annotations

import pytest
import torch

from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.ood_layers import OODLayers, least, middle
from smelt.distill.reverse_kl import ReverseKL
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

B, T, V = 2, 3, 11


def loaded(**sizes):
    return Loaded(tiny(**sizes), tiny_tokenizer(), None)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_the_smallest_equal_brute_force(count):
    mapped, state = random(5, B, T, 4), random(B, T, 4, seed=1)
    got = least(mapped, state, count)
    picks = set()
    for b in range(B):
        for t in range(T):
            far = [sum((x - y) ** 2 for x, y in zip(m[b, t].tolist(), state[b, t].tolist(), strict=True)) / 4 for m in mapped]
            assert got[b, t].item() == pytest.approx(sum(sorted(far)[:count]), rel=1e-12)
            picks.add(far.index(min(far)))
    assert len(picks) > 1  # tokens choose by themselves
    assert torch.autograd.gradcheck(lambda m, s: least(m, s, count), (mapped.requires_grad_(), state.requires_grad_()))


def test_equal_distances_are_counted_as_often_as_they_are_taken():
    state = random(B, T, 4)
    mapped = (state + torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)[:, None, None, None]).requires_grad_()
    found = least(mapped, state, 2)
    torch.testing.assert_close(found, torch.full((B, T), 2.0, dtype=torch.float64))
    found.sum().backward()
    assert mapped.grad.ne(0).sum() == 2 * B * T * 4 and not mapped.grad[3].any()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(2.0)])
def test_equals_the_slow_sum(divergence):
    method = OODLayers(layers=(1, 3), divergence=divergence)
    equipment = method.equipment(loaded(layers=3, hidden=16), loaded(layers=5, hidden=32)).double()
    own, other = [random(B, T, 16, seed=i) for i in range(4)], [random(B, T, 32, seed=9 + i) for i in range(6)]
    student, teacher = random(B, T, V, seed=20), random(B, T, V, seed=21)
    got = method(student, teacher, tuple(own), tuple(other), equipment)
    for b in range(B):
        for t in range(T):
            total = divergence(student[b, t], teacher[b, t]).item()
            for s in (1, 3):
                far = []
                for j in range(1, 6):
                    made = equipment.maps[j - 1].weight @ other[j][b, t] + equipment.maps[j - 1].bias
                    far.append(((made - own[s][b, t]) ** 2).mean().item())
                total += sum(sorted(far)[:2])
            assert got[b, t].item() == pytest.approx(total, rel=1e-10)


def test_who_learns():
    method = OODLayers()
    equipment = method.equipment(loaded(layers=4, hidden=16), loaded(layers=4, hidden=16)).double()
    own, other = ([random(B, T, 16, seed=seed + i).requires_grad_() for i in range(5)] for seed in (0, 9))
    student, teacher = (random(B, T, V, seed=seed).requires_grad_() for seed in (20, 21))
    method(student, teacher, tuple(own), tuple(other), equipment).sum().backward()
    assert [h.grad is not None for h in own] == [False, True, True, True, False]
    assert student.grad.any() and teacher.grad is None and all(h.grad is None for h in other)
    assert any(one.weight.grad.any() for one in equipment.maps)


def test_middle_layers():
    assert middle(12) == tuple(range(3, 10)) and middle(5) == (1, 2, 3) and middle(2) == (1,) and middle(1) == (1,)


def test_what_cannot_be_is_refused():
    student, teacher = loaded(layers=2), loaded(layers=3)
    with pytest.raises(SmeltError, match="layer 3 of the student, which has 2"):
        OODLayers(layers=(3,)).equipment(student, teacher)
    with pytest.raises(SmeltError, match="nearest=4, but the teacher has 3"):
        OODLayers(nearest=4).equipment(student, teacher)
    with pytest.raises(SmeltError, match="needs a teacher"):
        OODLayers().equipment(student, None)
    with pytest.raises(SmeltError, match="ood_layers: divergence is CrossEntropy"):
        OODLayers(divergence=CrossEntropy())
