from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.uld import ULD

B, T, S = 2, 5, 4


def random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def given(v, w, s=S):
    keep, kept = torch.ones(B, T, dtype=torch.bool), torch.ones(B, s, dtype=torch.bool)
    keep[0, :2] = kept[0, :1] = False
    kept[1, 2:] = False
    have = {"student": random(B, T, v), "teacher": random(B, s, w, seed=1), "labels": torch.arange(B * T).view(B, T) % v}
    return have | {"keep": keep, "teacher_ids": torch.zeros(B, s, dtype=torch.long), "teacher_keep": kept}


def slow(have, weight):
    """Sorted probabilities of one position at a time."""
    loss = torch.zeros(B, T, dtype=torch.float64)
    for b in range(B):
        theirs = [s for s in range(have["teacher"].shape[1]) if have["teacher_keep"][b, s]]
        mine = [t for t in range(T) if have["keep"][b, t]]
        for t in range(T):
            q = [math.exp(z) for z in have["student"][b, t].tolist()]
            q = [x / sum(q) for x in q]
            loss[b, t] = -math.log(q[have["labels"][b, t]])
            k = mine.index(t) if t in mine else len(theirs)
            if k < len(theirs):
                p = [math.exp(z) for z in have["teacher"][b, theirs[k]].tolist()]
                p = sorted((x / sum(p) for x in p), reverse=True)
                q = sorted(q, reverse=True)
                size = max(len(p), len(q))
                p, q = p + [0.0] * (size - len(p)), q + [0.0] * (size - len(q))
                loss[b, t] += weight * sum(abs(x - y) for x, y in zip(p, q, strict=True))
    return loss


@pytest.mark.parametrize(("v", "w"), [(7, 11), (11, 7), (9, 9)])
def test_equals_the_slow_sum_and_its_gradient_is_the_closed_form(v, w):
    have = given(v, w)
    torch.testing.assert_close(ULD(0.7)(**have), slow(have, 0.7), rtol=1e-12, atol=1e-12)

    def loss(student):
        return ULD(0.7)(**(have | {"student": student}))

    assert torch.autograd.gradcheck(loss, have["student"].requires_grad_())


def test_the_gradient_is_q_times_the_centred_signs():
    have = given(9, 9, T) | {name: torch.ones(B, T, dtype=torch.bool) for name in ("keep", "teacher_keep")}
    student = have["student"].requires_grad_()
    (ULD(1.0)(**have) - CrossEntropy()(student, have["labels"])).sum().backward()
    q, p = student.detach().softmax(-1), have["teacher"].softmax(-1)
    ranks = q.argsort(-1, descending=True).argsort(-1)
    sign = (q - p.sort(-1, descending=True).values.gather(-1, ranks)).sign()
    torch.testing.assert_close(student.grad, q * (sign - (q * sign).sum(-1, keepdim=True)))


def test_names_of_tokens_and_padding_of_the_vocabulary_do_not_matter():
    have = given(8, 8)
    plain = CrossEntropy()(have["student"], have["labels"])
    shuffled = have | {"teacher": have["teacher"][..., torch.randperm(8, generator=torch.Generator().manual_seed(3))]}
    torch.testing.assert_close(ULD()(**shuffled), ULD()(**have))
    absent = torch.full((B, S, 3), -math.inf, dtype=torch.float64)
    torch.testing.assert_close(ULD()(**(have | {"teacher": torch.cat([have["teacher"], absent], -1)})), ULD()(**have))
    apart = ULD(1.0)(**have) - plain
    assert ((apart >= -1e-12) & (apart <= 2 + 1e-12)).all()


def test_at_the_teacher_only_the_label_counts():
    have = given(9, 9, T)
    have |= {"teacher": have["student"].clone(), "teacher_keep": have["keep"]}
    student = have["student"].requires_grad_()
    plain = CrossEntropy()(student, have["labels"])
    assert torch.equal(ULD()(**have), plain)
    expected = torch.autograd.grad(plain.sum(), student)[0]
    torch.testing.assert_close(torch.autograd.grad(ULD()(**have).sum(), student)[0], expected, rtol=0, atol=1e-15)
