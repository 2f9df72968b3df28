from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from smelt.model._tiny import tiny
from smelt.weights._surgeon import expected, losses, per_row, quadratic, stacked, traced


@pytest.fixture
def given(rows):
    return tiny("llama"), *stacked(rows, torch.device("cpu"))


def test_rows_of_all_batches_padded_on_the_right():
    first = {"input_ids": torch.arange(6).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    second = {"input_ids": torch.arange(5)[None], "attention_mask": torch.ones(1, 5, dtype=torch.long)}
    ids, mask = stacked([first, second], torch.device("cpu"))
    assert ids.tolist() == [[0, 1, 2, 0, 0], [3, 4, 5, 0, 0], [0, 1, 2, 3, 4]]
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_losses_are_the_mean_over_real_tokens_of_each_row(given):
    model, ids, mask = given
    with torch.no_grad():
        made = losses(model, ids, mask)
        for row, keep, loss in zip(ids, mask, made, strict=True):
            logits = model(input_ids=row[None], attention_mask=keep[None]).logits[0].double().log_softmax(-1)
            each = [-logits[t - 1, row[t]] for t in range(1, len(row)) if keep[t] and keep[t - 1]]
            assert_close(loss.double(), sum(each) / len(each), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"])
def test_gradients_per_row_are_those_of_one_row_at_a_time(given, name):
    model, ids, mask = given
    linear = model.get_submodule(name)
    chosen = torch.randperm(linear.weight.numel(), generator=torch.Generator().manual_seed(0))[:50]
    with torch.no_grad():
        inputs, slopes, loss = traced(model, linear, ids, mask, batch=4)
        made = per_row(inputs, slopes, chosen)
    assert made.shape == (len(ids), 50) and made.dtype == torch.float64
    for at in range(len(ids)):
        one = losses(model, ids[at : at + 1], mask[at : at + 1])
        (want,) = torch.autograd.grad(one.sum(), linear.weight)
        assert_close(made[at], want.flatten()[chosen].double(), rtol=1e-4, atol=1e-7)
        assert_close(loss[at], one[0].detach())


def test_tracing_leaves_the_model_as_it_was(given):
    model, ids, mask = given
    model.lm_head.weight.requires_grad_(False)
    learned = {name: p.requires_grad for name, p in model.named_parameters()}
    linear = model.model.layers[0].mlp.up_proj
    traced(model, linear, ids, mask, batch=2)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learned and any(learned.values())
    assert all(p.grad is None for p in model.parameters()) and not linear._forward_hooks


def test_the_quadratic_form_is_the_objective_for_every_mask():
    size, rows, slope, ridge = 6, 4, 0.75, 1e-3
    draw = torch.Generator().manual_seed(0)
    was, g = torch.randn(size, generator=draw, dtype=torch.float64), torch.randn(rows, size, generator=draw, dtype=torch.float64)
    delta = -was * torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    q, c = quadratic(was, delta, g, slope, ridge)
    assert (q < 0).any()
    hessian = sum(torch.outer(one, one) for one in g) / rows
    for bits in itertools.product([0.0, 1.0], repeat=size):
        x = torch.tensor(bits, dtype=torch.float64)
        d = delta + x * was
        want = d @ hessian @ d / 2 - slope * (g.mean(0) @ d) + ridge * (d @ d)
        assert_close(x @ q @ x + c, want, rtol=0, atol=1e-10)
        assert expected(g, -d) == pytest.approx(float(-(g.mean(0) @ d) + d @ hessian @ d / 2), abs=1e-12)


def test_small_changes_of_weights_change_the_loss_as_expected(given):
    """First order exactly: the rest shrinks with the square of the change."""
    model, ids, mask = given
    linear = model.model.layers[1].self_attn.o_proj
    chosen = torch.arange(0, linear.weight.numel(), 7)
    with torch.no_grad():
        model.double()
        inputs, slopes, before = traced(model, linear, ids, mask, batch=6)
        g = per_row(inputs, slopes, chosen)
        change = -g.mean(0)
        off = []
        for size in (1e-2, 1e-3):
            linear.weight.view(-1)[chosen] += size * change
            measured = float(losses(model, ids, mask).double().mean() - before.double().mean())
            linear.weight.view(-1)[chosen] -= size * change
            off.append(abs(measured - expected(g, size * change)) / abs(expected(g, size * change)))
    assert off[0] < 0.2 and off[1] < 0.02
