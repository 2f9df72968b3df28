from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.data._tokens import tokenize
from smelt.data.files import Files
from smelt.distill import Equipped, Procedure
from smelt.distill._holding import token_divergence
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.distill.taid import TAID
from smelt.distill.weighted import Weighted
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Training, teach

V = 13


class Scaled(Equipped):
    """Reads its own parameter."""

    def __init__(self, start):
        self.start = start

    def equipment(self, student, teacher):
        made = torch.nn.Module()
        made.scale = torch.nn.Parameter(torch.tensor(self.start))
        return made

    def __call__(self, student, equipment):
        return equipment.scale * student.sum(-1)


class Samples(Procedure):
    def __call__(self, student):
        return student

    def teach(self, course):
        return {}

    @classmethod
    def example(cls):
        return cls()


def given():
    made = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, V, generator=made, dtype=torch.float64) for _ in range(2))
    return {"student": student, "teacher": teacher, "labels": torch.randint(V, (4,), generator=made)}


def test_value_and_gradient_are_the_weighted_sums():
    have = given()
    z, plain = have["student"].clone().requires_grad_(), have["student"].clone().requires_grad_()
    objective = Weighted((ForwardKL(2.0), CrossEntropy(), ReverseKL()), (0.7, 0.0, 2.0))
    assert objective.reads == ("student", "teacher", "labels")
    loss = objective(**have | {"student": z})
    expected = 0.7 * ForwardKL(2.0)(plain, have["teacher"]) + 2 * ReverseKL()(plain, have["teacher"])
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(z.grad, plain.grad, rtol=0, atol=1e-14)


def test_every_objective_gets_its_own_equipment_and_its_own_names():
    objective = Weighted((Scaled(2.0), CrossEntropy(), Scaled(5.0)), (1.0, 1.0, 0.5))
    assert objective.reads == ("student", "equipment", "labels")
    made = objective.equipment(None, None)
    assert set(made.state_dict()) == {"0.scale", "2.scale"}
    have = given()
    student, labels = have["student"], have["labels"]
    got = objective(student=student, labels=labels, equipment=made)
    torch.testing.assert_close(got, (2 + 0.5 * 5) * student.sum(-1) + CrossEntropy()(student, labels))


def test_the_total_goes_to_those_with_state_however_deep():
    inner = Weighted((CrossEntropy(), TAID()), (0.5, 0.5))
    objective = Weighted((Scaled(1.0), TAID(rate=0.5), inner), (1.0, 1.0, 1.0))
    made = objective.equipment(None, None)
    alone = TAID(rate=0.5).equipment(None, None)
    for step, loss in enumerate((3.0, 2.0, 2.5), 1):
        objective.after(made, loss, step / 10)
        TAID(rate=0.5).after(alone, loss, step / 10)
    for name, value in alone.state_dict().items():
        assert torch.equal(made["1"].state_dict()[name], value)
    assert made["2"]["1"].previous == 2.5
    assert made["0"].scale == 1


def test_of_divergences_alone_it_is_one():
    both = Weighted((ForwardKL(), ReverseKL()), (0.5, 0.5))
    token_divergence(both, "taid: objective")
    have = given()
    held = TAID(objective=both)
    made = held.equipment(None, None)
    made.t.fill_(1.0)
    got = held(have["student"], have["teacher"], made)
    torch.testing.assert_close(got, both(student=have["student"], teacher=have["teacher"]))
    with pytest.raises(SmeltError, match="Weighted, which reads student, teacher, labels"):
        TAID(objective=Weighted())


def test_written_in_a_recipe():
    text = "weighted(objectives=[taid(), cross_entropy()], weights=[1, 0.25])"
    objective = registry.parse(text, "distill")
    assert objective == Weighted((TAID(), CrossEntropy()), (1.0, 0.25))
    assert registry.parse(registry.text(objective), "distill") == objective
    assert registry.text(Weighted()) == "weighted()"


@pytest.mark.parametrize(
    ("objectives", "weights", "said"),
    [
        ((ForwardKL(),), (0.5, 0.5), "1 objectives and 2 weights"),
        ((), (), "0 objectives and 0 weights"),
        ((ForwardKL(),), (-1.0,), "finite numbers from 0"),
        ((ForwardKL(),), (math.inf,), "finite numbers from 0"),
        ((ForwardKL(),), (math.nan,), "finite numbers from 0"),
        ((ForwardKL(), CrossEntropy()), (0.0, 0.0), "at least one above it"),
        ((ForwardKL(), "cross_entropy"), (1.0, 1.0), r"objectives\[1\] is 'cross_entropy'"),
        ((ForwardKL,), (1.0,), "an objective is expected"),
        ((Samples(),), (1.0,), "an objective is expected"),
        ((lambda studnet: studnet,), (1.0,), "reads 'studnet'.*did you mean 'student'"),
    ],
)
def test_what_it_cannot_add_up_is_refused(objectives, weights, said):
    with pytest.raises(SmeltError, match=said):
        Weighted(objectives, weights)


def test_taid_beside_plain_training_through_the_loop_in_any_micro_batches(tmp_path):
    (tmp_path / "text").mkdir()
    for name in ("a", "b", "c"):
        (tmp_path / "text" / f"{name}.txt").write_text(f"def {name}(x):\n    return x + {name}\n" * 60, encoding="utf-8")
    tokens = tokenize(Files(str(tmp_path / "text" / "*.txt"), validation=0, test=0), "train", tiny_tokenizer(), tmp_path / "tokens")
    models, states = [], []
    for micro in (4, 1):
        student, teacher = (
            Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed), tiny_tokenizer(), tmp_path) for seed in (1, 2)
        )
        made = []

        class Kept(Weighted):
            def equipment(self, *sides, made=made):
                made.append(super().equipment(*sides))
                return made[-1]

        objective = Kept((TAID(rate=0.5), CrossEntropy()), (1.0, 0.5))
        settings = Training(tokens=4 * 4 * 16, context=16, batch=4, micro=micro, lr=1e-2)
        log = teach(student, teacher, tokens, objective, settings, tmp_path / str(micro))
        assert len(log["log"]) == 4
        models.append(student.model)
        states.append(made[0]["0"])
    assert states[0].t > 0.4
    torch.testing.assert_close(states[0].t, states[1].t, rtol=1e-4, atol=0)  # once a step, with the loss of the whole batch
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
