from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.distill.hidden_mse import HiddenMSE, _Maps, aligned
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

B, T = 2, 3


def loaded(**sizes):
    return Loaded(tiny(**sizes), tiny_tokenizer(), None)


def states(count, width, seed):
    made = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(B, T, width, generator=made, dtype=torch.float64) for _ in range(count))


def test_layer_maps():
    assert aligned("uniform", 2, 4) == ((1, 2), (2, 4))
    assert aligned("uniform", 5, 8) == ((1, 2), (2, 3), (3, 5), (4, 6), (5, 8))
    assert aligned("uniform", 4, 4) == tuple((i, i) for i in range(1, 5))
    assert aligned("uniform", 8, 2)[0] == (1, 1) and aligned("uniform", 8, 2)[-1] == (8, 2)
    assert aligned("last", 3, 7) == ((3, 7),)
    assert aligned(((0, 0), (-1, -2)), 3, 7) == ((0, 0), (3, 6))
    for student in range(1, 9):
        for teacher in range(1, 13):
            found = aligned("uniform", student, teacher)
            assert found[-1] == (student, teacher)
            for s, t in found:  # no other teacher layer is nearer in relative depth
                assert abs(t / teacher - s / student) == pytest.approx(min(abs(x / teacher - s / student) for x in range(1, teacher + 1)))


@pytest.mark.parametrize(("layers", "said"), [(((4, 0),), "layer 4 of the student"), (((0, -9),), "layer -9 of the teacher")])
def test_a_layer_that_is_not_there_is_refused(layers, said):
    with pytest.raises(SmeltError, match=said):
        aligned(layers, 3, 7)
    with pytest.raises(SmeltError, match="needs a teacher"):
        HiddenMSE().equipment(loaded(), None)


def test_is_written_in_a_recipe_as_lists():
    made = registry.parse("hidden_mse(layers=[[1, 2], [2, 4]])", "distill")
    assert made == HiddenMSE(layers=((1, 2), (2, 4))) and registry.parse(registry.text(made), "distill") == made
    for bad in ("[]", "'first'", "[1]", "3", "[[1, 2.0]]", "[[1, 2, 3]]"):
        with pytest.raises(SmeltError, match="layers"):
            registry.parse(f"hidden_mse(layers={bad})", "distill")


@pytest.mark.parametrize("width", [4, 6])
def test_equals_the_slow_sum_with_and_without_a_projector(width):
    student, teacher, pairs = states(3, 4, 0), states(5, width, 1), ((1, 2), (2, 4))
    maps = [torch.nn.Linear(4, width, bias=False, dtype=torch.float64) for _ in pairs] if width != 4 else []
    got = HiddenMSE()(student, teacher, _Maps(pairs, maps))
    for b in range(B):
        for t in range(T):
            total = 0.0
            for at, (s, u) in enumerate(pairs):
                x, y = student[s][b, t], teacher[u][b, t]
                made = [sum(w * v for w, v in zip(r, x, strict=True)) for r in maps[at].weight.detach()] if maps else list(x)
                total += sum(float(a - c) ** 2 for a, c in zip(made, y, strict=True)) / width / len(pairs)
            assert got[b, t].item() == pytest.approx(total, rel=1e-12)


def test_gradient_is_the_difference_and_only_the_student_and_the_map_learn():
    student, teacher = (tuple(x.requires_grad_() for x in states(3, 4, seed)) for seed in (0, 1))
    HiddenMSE()(student, teacher, _Maps(((1, 1), (2, 2)), [])).sum().backward()
    for s, t in zip(student[1:], teacher[1:], strict=True):
        torch.testing.assert_close(s.grad, (2 * (s - t) / (2 * 4)).detach(), rtol=1e-12, atol=0)
    assert student[0].grad is None and all(t.grad is None for t in teacher)
    equipment = HiddenMSE("last").equipment(loaded(hidden=32), loaded(hidden=64))
    loss = HiddenMSE("last")(tuple(torch.randn(1, 2, 32) for _ in range(3)), tuple(torch.randn(1, 2, 64) for _ in range(3)), equipment)
    loss.sum().backward()
    assert len(equipment.maps) == 1 and equipment.maps[0].weight.grad.any()


def test_identical_models_have_loss_zero():
    one = loaded(layers=3)
    hidden = one.model(input_ids=torch.arange(2, 12)[None], output_hidden_states=True).hidden_states
    equipment = HiddenMSE().equipment(one, one)
    assert not list(equipment.parameters()) and not HiddenMSE()(hidden, hidden, equipment).any()
    other = loaded(layers=3, seed=1).model(input_ids=torch.arange(2, 12)[None], output_hidden_states=True).hidden_states
    assert (HiddenMSE()(other, hidden, equipment) > 0).all()
