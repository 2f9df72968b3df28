from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cosine_similarity

from smelt.distill.emo import EMO

V, D = 11, 5


def given(seed=0, scale=2.0):
    made = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(2, 3, V, generator=made, dtype=torch.float64)
    return student, torch.randint(V, (2, 3), generator=made), torch.randn(V, D, generator=made, dtype=torch.float64)


def slow(student, labels, head):
    """(NLL, D), one position and one token at a time."""
    nll, far = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    for i in range(2):
        for t in range(3):
            q, x = student[i, t].softmax(-1), labels[i, t]
            nll[i, t] = -q[x].log()
            far[i, t] = sum(q[v] * (1 - cosine_similarity(head[v], head[x], dim=0)) for v in range(V))
    return nll, far


def test_both_forms_equal_the_slow_sums():
    student, labels, head = given()
    nll, far = slow(student, labels, head)
    torch.testing.assert_close(EMO(2)(student, labels, head) / 2, far, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(EMO(1)(student, labels, head), nll, rtol=1e-12, atol=1e-14)
    capped = (nll + (nll / far).clamp(max=1.5) * far) / 2
    assert (capped < nll).any()
    torch.testing.assert_close(EMO(1, cap=1.5)(student, labels, head), capped, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("form", "cap"), [(1, math.inf), (1, 1.5), (2, math.inf)])
def test_gradient_holds_the_ratio_fixed(form, cap):
    student, labels, head = given(1)
    z = student.clone().requires_grad_()
    nll, far = slow(z, labels, head)
    of_nll = torch.autograd.grad(nll.sum(), z, retain_graph=True)[0]
    of_far = torch.autograd.grad(far.sum(), z)[0]
    nll, far = nll.detach()[..., None], far.detach()[..., None]
    ratio = (nll / far).clamp(max=cap)
    expected = (of_nll + ratio * of_far) / 2 if form == 1 else of_far + far / nll * of_nll
    again = student.clone().requires_grad_()
    EMO(form, cap)(again, labels, head).sum().backward()
    torch.testing.assert_close(again.grad, expected, rtol=1e-10, atol=1e-13)


def test_it_is_the_earth_movers_distance_to_the_label():
    ot = pytest.importorskip("ot")
    student, labels, head = given(2)
    q = student.softmax(-1)
    unit = head / head.norm(dim=-1, keepdim=True)
    cost = (1 - unit @ unit.T).clamp(min=0).numpy()
    got = EMO(2)(student, labels, head) / 2
    for i in range(2):
        for t in range(3):
            label = torch.nn.functional.one_hot(labels[i, t], V).double().numpy()
            assert got[i, t].item() == pytest.approx(ot.emd2(q[i, t].numpy(), label, cost), rel=1e-9)


def test_equal_embeddings_are_no_way_apart():
    student, labels, head = given()
    far = EMO(2)(student, labels, head[:1].expand(V, D))
    torch.testing.assert_close(far, torch.zeros_like(far), rtol=0, atol=1e-14)
    loss = EMO(1, cap=3.0)(student, labels, head[:1].expand(V, D))
    torch.testing.assert_close(loss, -student.log_softmax(-1).gather(-1, labels[..., None])[..., 0] / 2)


def test_length_of_rows_and_rows_beyond_the_students_width_do_not_count():
    student, labels, head = given()
    longer = torch.cat([head * torch.rand(V, 1, dtype=torch.float64).add(0.5), torch.randn(3, D, dtype=torch.float64)])
    for form in (1, 2):
        torch.testing.assert_close(EMO(form)(student, labels, longer), EMO(form)(student, labels, head))


def test_a_student_sure_of_the_label_is_left_alone_and_digits_are_kept_near_it():
    head = torch.eye(V)  # cos = 0: D = 1 - q_x
    labels = torch.zeros(3, dtype=torch.long)
    for form in (1, 2):
        student = torch.zeros(3, V)
        student[:, 0] = torch.tensor([8.0, 20.0, 200.0])
        student.requires_grad_()
        loss = EMO(form)(student, labels, head)
        loss.sum().backward()
        other = ((V - 1) / (student.detach().double()[:, 0].exp() + V - 1)).float()  # 3e-3, 2e-8 and 0
        whole = -torch.log1p(-other[0]) if form == 1 else 2 * other[0]
        assert loss[0].item() == pytest.approx(whole.item(), rel=1e-3)
        assert loss[1] >= (0.999 * other[1] if form == 2 else 0)  # in float32 log q_x is 0 here, and D is not
        assert (student.grad.norm(dim=-1) <= 4 * other).all()
        assert (student.grad.norm(dim=-1)[:2] > 0).all()
        assert loss[2] == 0


def test_a_near_miss_costs_less_than_a_far_one():
    head = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0]])
    labels = torch.zeros((), dtype=torch.long)
    near, far = (EMO(2)(torch.tensor(z), labels, head) for z in ([0.0, 3.0, 0.0], [0.0, 0.0, 3.0]))
    assert near < 0.2 * far
