from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.distill.taid import TAID
from smelt.spec import SmeltError

V = 13


def pair(*shape):
    made = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=made, dtype=torch.float64) for _ in range(2)]


def state(objective, t=None):
    made = objective.equipment(None, None).double()
    if t is not None:
        made.t.fill_(t)
    return made


def followed(objective, losses):
    """t after every step of a training with these losses."""
    made, seen = state(objective), []
    for step, loss in enumerate(losses, 1):
        objective.after(made, loss, step / len(losses))
        seen.append(made.t.item())
    return seen


@pytest.mark.parametrize("t", [0.0, 0.3, 0.7, 1.0])
def test_gradient_is_the_student_less_the_mixture(t):
    student, teacher = pair(4, V)
    z = student.clone().requires_grad_()
    loss = TAID()(z, teacher, state(TAID(), t))
    loss.sum().backward()
    r = ((1 - t) * student + t * teacher).softmax(-1)
    torch.testing.assert_close(z.grad, student.softmax(-1) - r, rtol=0, atol=1e-14)
    expected = (r * (r.log() - student.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-10, atol=1e-14)


class Taped:
    """A KL that would give its teacher a gradient."""

    def __call__(self, student, teacher):
        log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_no_gradient_flows_through_the_students_share_of_the_target():
    student, teacher = pair(4, V)
    z = student.clone().requires_grad_()
    held = TAID(objective=Taped())
    held(z, teacher.requires_grad_(), state(held, 0.3)).sum().backward()
    r = (0.7 * student + 0.3 * teacher.detach()).softmax(-1)
    torch.testing.assert_close(z.grad, student.softmax(-1) - r, rtol=0, atol=1e-14)
    assert teacher.grad is None


def test_at_the_start_there_is_nothing_to_learn_and_at_the_end_it_is_the_objective():
    student, teacher = pair(4, V)
    z = student.clone().requires_grad_()
    loss = TAID()(z, teacher, state(TAID(), 0.0))
    loss.sum().backward()
    assert not loss.any()
    assert not z.grad.any()
    for objective in (ForwardKL(), ReverseKL(), ForwardKL(2.0)):
        held = TAID(objective=objective)
        torch.testing.assert_close(held(student, teacher, state(held, 1.0)), objective(student, teacher))


def test_a_temperature_is_that_of_the_mixed_logits():
    student, teacher = pair(4, V)
    z = student.clone().requires_grad_()
    held = TAID(objective=ForwardKL(3.0))
    held(z, teacher, state(held, 0.4)).sum().backward()
    r = ((0.6 * student + 0.4 * teacher) / 3).softmax(-1)
    torch.testing.assert_close(z.grad, 3 * ((student / 3).softmax(-1) - r), rtol=0, atol=1e-14)


def test_a_constant_loss_moves_t_by_half_the_rate_of_what_is_left():
    objective = TAID(start=0.2, end=0.999, rate=0.3)
    made = state(objective)
    objective.after(made, 2.0, 0.0)
    assert made.t.item() == pytest.approx(0.2)  # the first step only stores its loss
    expected = 0.2
    for _ in range(10):
        objective.after(made, 2.0, 0.0)
        expected += 0.3 * (1 - expected) / 2
        assert made.t.item() == pytest.approx(expected, rel=1e-6)
    assert made.momentum.item() == 0


def test_the_schedule_step_by_step():
    objective = TAID(start=0.1, end=0.9, rate=0.5, momentum=0.6)
    losses = [3.0, 2.5, 2.6, 1.9, 1.5, 1.6, 1.0]
    t, momentum, expected = 0.1, 0.0, []
    for step, loss in enumerate(losses):
        if step:
            momentum = 0.6 * momentum + 0.4 * (losses[step - 1] - loss) / losses[step - 1]
            line = 0.1 + 0.8 * (step + 1) / len(losses)
            t = min(0.9, max(line, t + 0.5 * (1 - t) / (1 + math.exp(-momentum))))
        expected.append(t)
    assert followed(objective, losses) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx([0.1 + 0.8 * (step + 1) / len(losses) for step in range(len(losses))], rel=0.1)


def test_t_never_falls_never_is_below_the_line_and_ends_at_the_end():
    made = torch.Generator().manual_seed(1)
    for objective in (TAID(), TAID(start=0.0, end=0.8, rate=0.1), TAID(rate=1.0, momentum=0.0)):
        losses = (5 * torch.rand(40, generator=made)).tolist()
        seen = followed(objective, losses)
        for step, (before, t) in enumerate(zip([objective.start, *seen], seen, strict=False), 1):
            assert before - 1e-7 <= t <= objective.end + 1e-7
            if step > 1:
                assert t >= objective.start + (objective.end - objective.start) * step / 40 - 1e-6
        assert seen[-1] == pytest.approx(objective.end)


def test_a_student_that_keeps_up_is_led_on_faster():
    objective = TAID(start=0.1, rate=0.2, momentum=0.5)
    steps = {}
    for name, factor in (("falling", 0.5), ("constant", 1.0), ("rising", 1.5)):
        made = state(objective)
        for step in range(8):
            objective.after(made, factor**step, 0.0)
        steps[name] = made.t.item()
    assert steps["falling"] > steps["constant"] > steps["rising"] > 0.1


def test_a_loss_that_starts_at_zero_does_not_stop_the_schedule():
    objective = TAID(start=0.0, rate=0.5)
    made = state(objective)
    objective.after(made, 0.0, 0.0)
    objective.after(made, 4.0, 0.0)
    assert made.momentum.item() == pytest.approx(-0.01)  # a rise without bound counts as a doubling
    assert made.t.item() == pytest.approx(0.5 / (1 + math.exp(0.01)))


def test_interpolated_is_the_line_alone():
    assert followed(TAID(rate=1.0, interpolated=True), [3.0, 1.0, 0.5, 9.0]) == pytest.approx([0.55, 0.7, 0.85, 1.0])


def test_the_state_is_three_buffers_and_no_parameter():
    objective = TAID()
    made, again = state(objective), state(objective)
    for step in range(1, 5):
        objective.after(made, 1.0 / step, step / 10)
    assert not list(made.parameters())
    assert set(made.state_dict()) == {"t", "previous", "momentum"}
    again.load_state_dict(made.state_dict())
    for one in (made, again):
        objective.after(one, 0.1, 0.5)
    assert made.t == again.t
    assert made.momentum == again.momentum


def test_only_a_token_divergence_is_held_and_the_way_goes_forward():
    assert registry.parse("taid(objective=reverse_kl(), start=0.2)", "distill") == TAID(objective=ReverseKL(), start=0.2)
    with pytest.raises(SmeltError, match="taid: objective is CrossEntropy"):
        TAID(objective=CrossEntropy())
    with pytest.raises(SmeltError, match=r"taid: start=0\.5 is after end=0\.4"):
        TAID(start=0.5, end=0.4)
