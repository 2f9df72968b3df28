import math

import pytest
import torch

from smelt.align.dpo import DPO
from smelt.registry import check, parse, text
from smelt.spec import SmeltError


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (2.0, 0.0), (0.5, 0.1), (1.0, 0.49)])
def test_value_and_gradient_are_the_closed_form(beta, smoothing):
    random = torch.Generator().manual_seed(1)
    w, r, w_ref, r_ref = (-3 * torch.rand(9, generator=random, dtype=torch.float64) for _ in range(4))
    w.requires_grad_(), r.requires_grad_()
    loss = DPO(beta, smoothing)(w, r, w_ref, r_ref)
    loss.sum().backward()
    for i in range(9):
        h = beta * ((w[i] - w_ref[i]) - (r[i] - r_ref[i])).item()
        assert loss[i].item() == pytest.approx(-(1 - smoothing) * math.log(sigmoid(h)) - smoothing * math.log(sigmoid(-h)), rel=1e-12)
        assert w.grad[i].item() == pytest.approx(-beta * (sigmoid(-h) - smoothing), rel=1e-10)
        assert r.grad[i].item() == pytest.approx(+beta * (sigmoid(-h) - smoothing), rel=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_log_2_at_the_reference(smoothing):
    w, r = torch.tensor([-30.0, -1e4, 0.0]).double(), torch.tensor([-20.0, -3.0, 0.0]).double()
    assert torch.allclose(DPO(0.3, smoothing)(w, r, w, r), torch.full((3,), math.log(2), dtype=torch.float64), rtol=1e-15, atol=0)


def test_the_example_of_the_notes():
    w, r, w_ref, r_ref = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (-30.0, -20.0, -28.0, -22.0))
    loss = DPO(0.1)(w, r, w_ref, r_ref)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(1 + math.exp(0.4)), rel=1e-12)  # .91302
    assert w.grad.item() == pytest.approx(-0.1 * sigmoid(0.4), rel=1e-12)  # -.059869


def test_smoothed_loss_is_least_where_the_belief_is_right():
    h = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    zero = torch.zeros_like(h)
    best = h[DPO(1.0, 0.1)(h, zero, zero, zero).argmin()].item()
    assert sigmoid(best) == pytest.approx(0.9, abs=1e-4)


def test_a_tabular_policy_converges_to_the_closed_form_optimum():
    """pi(y) ~ pi_ref(y) exp(r(y) / beta), where pairs are labelled by Bradley and Terry's law with reward r."""
    random = torch.Generator().manual_seed(2)
    reward, reference = torch.randn(5, generator=random).double(), torch.randn(5, generator=random).double().log_softmax(0)
    logits = reference.clone().requires_grad_()
    beta = 0.5
    i, j = (x.flatten() for x in torch.meshgrid(torch.arange(5), torch.arange(5), indexing="ij"))
    wins = torch.sigmoid(reward[i] - reward[j])
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        policy = logits.log_softmax(0)
        loss = (wins * DPO(beta)(policy[i], policy[j], reference[i], reference[j])).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    wanted = (reference + reward / beta).softmax(0)
    assert 0.5 * (logits.softmax(0) - wanted).abs().sum() < 1e-5


def test_recipe_text_and_ranges():
    assert text(parse("dpo(beta=0.5)", "align")) == "dpo(beta=0.5)"
    check(DPO())
    for bad in ("dpo(beta=0.0)", "dpo(smoothing=0.5)", "dpo(smoothing=-0.1)"):
        with pytest.raises(SmeltError):
            parse(bad, "align")
