from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from smelt.data._tokens import tokenize
from smelt.data.files import Files
from smelt.distill._capture import Capture
from smelt.distill.minilm import MiniLM, scores, split
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Training, teach

B, T = 2, 6


def loaded(**sizes):
    return Loaded(tiny(**sizes), tiny_tokenizer(), None)


def projected(heads, kv, width, seed, layers=2):
    made = torch.Generator().manual_seed(seed)
    return tuple(tuple(torch.randn(B, T, n * width, generator=made, dtype=torch.float64) for n in (heads, kv, kv)) for _ in range(layers))


def heads_of(student=(4, 2), teacher=(4, 2)):
    return SimpleNamespace(student_heads=student[0], student_kv=student[1], teacher_heads=teacher[0], teacher_kv=teacher[1])


KEEP = torch.ones(B, T, dtype=torch.bool)


def row(a, b, i):
    """softmax over j <= i of a_i . b_j / sqrt(d), one number at a time."""
    s = [sum(x * y for x, y in zip(a[i].tolist(), b[j].tolist(), strict=True)) / math.sqrt(a.shape[-1]) for j in range(i + 1)]
    return [math.exp(x) / sum(map(math.exp, s)) for x in s]


def slow(method, student, teacher, counts, at, i):
    """One position of one row: loops over relations and heads."""
    total = 0.0
    for which in ("qq", "kk", "vv") if method.version == 2 else ("qk", "vv"):
        heads = method.heads if method.version == 2 else counts[0][0]
        found = 0.0
        for h in range(heads):
            rows = []
            for layers, (own, kv) in ((student, counts[0]), (teacher, counts[1])):
                pair = []
                for name in which:
                    x = layers[-1]["qkv".index(name)][at]
                    held = method.heads if method.version == 2 else own if name == "q" else kv
                    place = h if method.version == 2 or name == "q" else h // (own // kv)
                    d = x.shape[-1] // held
                    pair.append(x[:, place * d : (place + 1) * d])
                rows.append(row(*pair, i))
            found += sum(p * math.log(p / q) for q, p in zip(*rows, strict=True))
        total += found / heads
    return total / 3 if method.version == 2 else total


@pytest.mark.parametrize("method", [MiniLM(heads=2), MiniLM(heads=4), MiniLM(version=1)])
@pytest.mark.parametrize("kv", [1, 2, 4])
def test_equals_the_slow_loops_with_other_widths_and_no_projector(method, kv):
    student, teacher = projected(4, 2, 4, 0), projected(4, kv, 8, 1)
    got = method(student, teacher, KEEP, heads_of((4, 2), (4, kv)))
    assert got.shape == (B, T)
    for at in range(B):
        for i in range(T):
            assert got[at, i].item() == pytest.approx(slow(method, student, teacher, ((4, 2), (4, kv)), at, i), rel=1e-10, abs=1e-14)
    assert not got[:, 0].any() and (got[:, 1:] > 0).all()


@pytest.mark.parametrize("method", [MiniLM(heads=2), MiniLM(version=1)])
def test_gradient(method):
    student, teacher = projected(2, 1, 4, 0, layers=1), projected(2, 1, 4, 1, layers=1)

    def loss(*x):
        return method((x,), teacher, KEEP, heads_of((2, 1), (2, 1)))

    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in student[0]])


@pytest.mark.parametrize("method", [MiniLM(heads=4), MiniLM(version=1)])
def test_a_turn_inside_every_value_head_changes_nothing(method):
    student, teacher = projected(4, 4, 4, 0), projected(4, 4, 4, 1)
    before = method(student, teacher, KEEP, heads_of((4, 4), (4, 4)))
    turn = torch.linalg.qr(torch.randn(4, 4, 4, dtype=torch.float64))[0]
    q, k, v = student[-1]
    turned = torch.einsum("bhtd,hde->bhte", split(v, 4), turn).transpose(1, 2).flatten(2)
    torch.testing.assert_close(method((student[0], (q, k, turned)), teacher, KEEP, heads_of((4, 4), (4, 4))), before, rtol=0, atol=1e-12)
    bent = v.clone()
    bent[..., 0] += 1
    assert (method((student[0], (q, k, bent)), teacher, KEEP, heads_of((4, 4), (4, 4))) - before).abs().max() > 1e-3


@pytest.mark.parametrize("method", [MiniLM(heads=4), MiniLM(version=1)])
def test_what_comes_later_and_what_does_not_count(method):
    student, teacher = projected(4, 2, 4, 0), projected(4, 2, 4, 1)
    before = method(student, teacher, KEEP, heads_of())
    changed = tuple(tuple(torch.cat([x[:, :4], 9 * x[:, 4:]], 1) for x in layer) for layer in student)
    after = method(changed, teacher, KEEP, heads_of())
    assert torch.equal(after[:, :4], before[:, :4]) and (after[:, 4:] != before[:, 4:]).all()
    keep = KEEP.clone()
    keep[0, 2] = False
    found = method(student, teacher, keep, heads_of())
    assert found[0, 2] == 0 and torch.equal(found[keep], before[keep])


def test_scores_are_causal():
    x = torch.randn(1, 1, 3, 2)
    assert torch.equal(scores(x, x).softmax(-1)[0, 0].triu(1), torch.zeros(3, 3))


def test_gradient_reaches_the_student_up_to_its_layer_only_and_is_zero_at_the_teacher():
    student, teacher = loaded(layers=3, seed=1), loaded(layers=3, seed=2)
    captures = [Capture(one.model) for one in (student, teacher)]
    ids = torch.arange(2, 14)[None]
    method = MiniLM(student_layer=1)
    for one in (student, teacher):
        one.model(input_ids=ids)
    method(captures[0].take(), captures[1].take(), torch.ones_like(ids).bool(), method.equipment(student, teacher)).sum().backward()
    for name, p in student.model.model.layers.named_parameters():
        layer, rest = name.split(".", 1)
        reached = int(layer) < 1 or (layer == "1" and rest.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "input_layernorm"))
        assert (p.grad is not None and bool(p.grad.any())) == reached, name
    student.model(input_ids=ids)
    same = captures[0].take()
    assert not MiniLM()(same, same, torch.ones_like(ids).bool(), MiniLM().equipment(student, student)).any()


@pytest.mark.parametrize(
    ("method", "sizes", "said"),
    [
        (MiniLM(student_layer=2), {}, "student_layer=2, but the student has 2 layers"),
        (MiniLM(teacher_layer=-4), {}, "teacher_layer=-4, but the teacher has 3 layers"),
        (MiniLM(heads=3), {}, "heads=3 does not divide the width 64 of the student's queries"),
        (MiniLM(heads=64), {}, "heads=64 does not divide the width 32 of the student's keys"),
        (MiniLM(version=1), {"heads": 8}, "the student has 4, the teacher 8: take version=2"),
    ],
)
def test_what_cannot_be_is_refused(method, sizes, said):
    with pytest.raises(SmeltError, match=said):
        method.equipment(loaded(layers=2), loaded(layers=3, **sizes))
    with pytest.raises(SmeltError, match="needs a teacher"):
        method.equipment(loaded(layers=2), None)


def test_a_training_brings_relations_together(tmp_path):
    (tmp_path / "a.txt").write_text("def f(x):\n    return x + 1\n" * 200)
    corpus = Files(str(tmp_path / "a.txt"), validation=0.0, test=0.0)
    student, teacher = loaded(layers=1, hidden=32, heads=2, kv_heads=1, seed=1), loaded(layers=2, seed=2)
    tokens = tokenize(corpus, "train", tiny_tokenizer(), tmp_path / "tokens")
    settings = Training(data=corpus, tokens=40 * 4 * 16, context=16, batch=4, lr=1e-2, optimizer="muon", teacher="base")
    log = teach(student, teacher, tokens, MiniLM(heads=4), settings, tmp_path / "fit")["log"]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
