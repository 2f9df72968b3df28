from __future__ import annotations

import math

import pytest
import torch

from smelt.distill._mixture import mixture


@pytest.mark.parametrize("weight", [1e-4, 0.1, 0.5, 0.9])
def test_equals_the_logarithms_of_the_mixed_probabilities(weight):
    made = torch.Generator().manual_seed(0)
    log_a, log_b = (torch.randn(50, 7, generator=made, dtype=torch.float64).mul(4).log_softmax(-1) for _ in range(2))
    mixed = (weight * log_a.exp() + (1 - weight) * log_b.exp()).log()
    to_a, to_b = mixture(log_a, log_b, weight)
    torch.testing.assert_close(to_a, mixed - log_a, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(to_b, mixed - log_b, rtol=1e-10, atol=1e-14)


def test_small_differences_keep_their_digits_in_float32():
    log_b = torch.full((3,), -20.0)
    log_a = log_b + torch.tensor([2.0**-18, -(2.0**-18), 0.0])  # exact in float32
    to_a, to_b = mixture(log_a, log_b, 0.25)
    d = (log_a - log_b).double()
    torch.testing.assert_close(to_b.double(), torch.log1p(0.25 * torch.expm1(d)), rtol=1e-6, atol=0)
    torch.testing.assert_close(to_a.double(), torch.log1p(0.75 * torch.expm1(-d)), rtol=1e-6, atol=0)
    assert to_a[2] == to_b[2] == 0


def test_tokens_that_one_side_or_both_rule_out():
    none, some = -math.inf, math.log(0.3)
    to_a, to_b = mixture(torch.tensor([none, some, none]), torch.tensor([some, none, none]), 0.2)
    torch.testing.assert_close(to_a, torch.tensor([math.inf, math.log(0.2), 0.0]))
    torch.testing.assert_close(to_b, torch.tensor([math.log(0.8), math.inf, 0.0]))
    assert mixture(torch.tensor([math.nan]), torch.tensor([0.0]), 0.2)[0].isnan().all()


def test_inputs_are_left_alone():
    log_a, log_b = torch.randn(2, 9).log_softmax(-1), torch.randn(2, 9).log_softmax(-1)
    before = log_a.clone(), log_b.clone()
    mixture(log_a, log_b, 0.3)
    assert torch.equal(log_a, before[0])
    assert torch.equal(log_b, before[1])
