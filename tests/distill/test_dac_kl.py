from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.dac_kl import START, Band, DacKL, clipped, spans, word_ends
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer

B, T, V = 2, 5, 13


def tensors(seed=0, scale=2.0):
    made = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(B, T, V, generator=made, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(V, (B, T), generator=made)
    keep = torch.ones(B, T, dtype=torch.bool)
    keep[0, 3] = False
    return student, teacher, labels, keep


def band(starts=None, ends=None, classes=6, seed=1):
    torch.manual_seed(seed)
    made = torch.Generator().manual_seed(seed)
    every = torch.ones(V, dtype=torch.bool)
    found = Band(classes, 4, every if starts is None else starts, every if ends is None else ends).double()
    with torch.no_grad():
        found.last.weight.normal_(generator=made)
        found.last.bias.copy_(torch.tensor([-1.0, 1.5]))
    return found


def slow(student, teacher, labels, keep, equipment, span, softness):
    """Position by position, class by class."""
    q, p = student.softmax(-1), teacher.softmax(-1)
    loss = torch.zeros(B, T, dtype=torch.float64)
    for i in range(B):
        for t in range(T):
            low, high = (x.item() for x in equipment(p[i, t].log()))
            order = sorted(range(V), key=lambda v: -float(p[i, t, v]))
            kept_p, kept_q, mass = {}, {}, 0.0
            for v in order:
                middle = mass + float(p[i, t, v]) / 2
                mass += float(p[i, t, v])
                x = math.log(middle / (1 - middle))
                gate = 1 / (1 + math.exp(-(x - low) / softness)) / (1 + math.exp(-(high - x) / softness))
                gate = 1.0 if v == labels[i, t] else gate
                kept_p[v], kept_q[v] = gate * float(p[i, t, v]), gate * float(q[i, t, v])
            all_p, all_q = sum(kept_p.values()), sum(kept_q.values())
            loss[i, t] = sum(kept_p[v] / all_p * math.log(kept_p[v] / all_p / (kept_q[v] / all_q)) for v in order)
            if t and keep[i, t - 1] and keep[i, t] and equipment.ends[labels[i, t - 1]] and equipment.starts[labels[i, t]]:
                loss[i, t] += span * sum(float(q[i, t - 1, v] * q[i, t, v] - p[i, t - 1, v] * p[i, t, v]) ** 2 for v in range(V))
    return loss


@pytest.mark.parametrize("span, softness", [(1.0, 0.5), (0.0, 0.1), (3.0, 2.0)])
def test_equals_the_slow_sum(span, softness):
    for seed in range(3):
        student, teacher, labels, keep = tensors(seed)
        made = torch.Generator().manual_seed(seed)
        equipment = band(*(torch.rand(V, generator=made) > 0.4 for _ in range(2)))
        got = DacKL(span=span, softness=softness)(student, teacher, labels, keep, equipment)
        torch.testing.assert_close(got, slow(student, teacher, labels, keep, equipment, span, softness), rtol=1e-9, atol=1e-12)


def test_a_band_that_is_wholly_open_is_forward_kl():
    student, teacher, labels, _ = tensors()
    infinite = torch.full((B, T), math.inf, dtype=torch.float64)
    student.requires_grad_()
    for softness in (0.1, 1.0):
        got = clipped(student.log_softmax(-1), teacher.log_softmax(-1), labels, -infinite, infinite, softness)
        exact = ForwardKL()(student, teacher)
        torch.testing.assert_close(got, exact, rtol=1e-13, atol=1e-14)
        (mine,), (theirs,) = (torch.autograd.grad(loss.sum(), student) for loss in (got, exact))
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-14)


def test_a_closed_band_keeps_the_label_alone_and_a_hard_one_cuts_the_tail():
    student, teacher, labels, _ = tensors()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    nowhere = torch.full((B, T), 50.0, dtype=torch.float64)
    closed = clipped(log_q, log_p, labels, nowhere, -nowhere, 0.5)
    assert closed.abs().max() < 1e-12  # one class: p' = q' = 1
    ninety = torch.full((B, T), math.log(9), dtype=torch.float64)  # log-odds of 0.9
    hard = clipped(log_q, log_p, labels, -nowhere, ninety, 1e-4)
    for i in range(B):
        for t in range(T):
            p, order = log_p[i, t].exp().sort(descending=True)
            inside = {int(v) for v, c, m in zip(order, p.cumsum(0), p) if c - m / 2 < 0.9} | {int(labels[i, t])}
            some = torch.tensor(sorted(inside))
            a, b = log_p[i, t, some].log_softmax(0), log_q[i, t, some].log_softmax(0)
            assert hard[i, t].item() == pytest.approx(float((a.exp() * (a - b)).sum()), rel=1e-9, abs=1e-12)


def test_gradients():
    student, teacher, labels, keep = tensors()
    equipment, method = band(), DacKL()
    assert torch.autograd.gradcheck(lambda z: method(z, teacher, labels, keep, equipment), student.clone().requires_grad_())
    names, values = zip(*equipment.named_parameters(), strict=True)

    def by_equipment(*given):
        called = lambda log_p: torch.func.functional_call(equipment, dict(zip(names, given, strict=True)), (log_p,))  # noqa: E731
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        return clipped(log_q, log_p, labels, *called(log_p), 0.5)

    assert torch.autograd.gradcheck(by_equipment, tuple(v.detach().clone().requires_grad_() for v in values))
    logits = student.clone().requires_grad_()
    log_p = teacher.log_softmax(-1)
    low, high = equipment(log_p)
    clipped(logits.log_softmax(-1), log_p, labels, low, high, 0.5).sum().backward()
    p, order = log_p.sort(descending=True)
    x = torch.logit(p.exp().cumsum(-1) - p.exp() / 2, eps=1e-15)
    gate = torch.sigmoid((x - low[..., None]) / 0.5) * torch.sigmoid((high[..., None] - x) / 0.5)
    gate = torch.zeros_like(gate).scatter(-1, order, gate).scatter(-1, labels[..., None], 1.0)
    kept = [gate * z.softmax(-1) for z in (student, teacher)]
    q, p = (x / x.sum(-1, keepdim=True) for x in kept)
    torch.testing.assert_close(logits.grad, (q - p).detach(), rtol=0, atol=1e-13)  # q' - p'


def test_the_span_term_is_zero_at_the_teacher_and_between_words():
    _, teacher, labels, keep = tensors()
    log_p = teacher.log_softmax(-1)[0]
    assert not spans(log_p[:-1], log_p[1:], log_p[:-1], log_p[1:]).any()
    student = tensors(4)[0]
    none = torch.zeros(V, dtype=torch.bool)
    for apart in (band(starts=none), band(ends=none)):
        assert torch.equal(DacKL()(student, teacher, labels, keep, apart), DacKL(span=0.0)(student, teacher, labels, keep, apart))
    inside, alone = DacKL()(student, teacher, labels, keep, band()), DacKL(span=0.0)(student, teacher, labels, keep, band())
    counted = torch.ones(B, T, dtype=torch.bool)
    counted[:, 0] = counted[0, 3:] = False  # no token before it, or one of the two does not count
    assert torch.equal(inside > alone, counted)


def test_the_equipment_of_a_model_knows_its_words_and_starts_wide():
    student = Loaded(tiny(), tiny_tokenizer(), None)
    made = DacKL().equipment(student, None)
    low, high = made(torch.randn(3, 320).log_softmax(-1))
    torch.testing.assert_close(torch.stack([low, high]), torch.tensor([[-START] * 3, [START] * 3]))
    tokenizer = student.tokenizer
    starts, ends = word_ends(tokenizer, 330)
    assert torch.equal(starts, made.starts.new_zeros(330).masked_scatter(torch.arange(330) < 320, made.starts))
    for text, inside, after in (("a", True, True), ("_", True, True), (" ", False, False), ("(", False, False), ("\n", False, False)):
        (token,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert (bool(starts[token]), bool(ends[token])) == (inside, after), text
    spaced = [i for i in range(len(tokenizer)) if tokenizer.decode([i])[:1] == " " and tokenizer.decode([i])[-1:].isalnum()]
    assert spaced and all(not starts[i] and ends[i] for i in spaced)
    assert not starts[tokenizer.eos_token_id] and not ends[tokenizer.eos_token_id]


def test_tokens_the_teacher_rules_out_cost_nothing():
    student, teacher, labels, keep = tensors()
    labels = labels.clamp(min=4)
    ruled = teacher.clone()
    ruled[..., :4] = -math.inf
    student.requires_grad_()
    loss = DacKL()(student, ruled, labels, keep, band())
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(student.grad).all()
