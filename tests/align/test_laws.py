"""Laws of every preference objective; none is named here."""

from __future__ import annotations

import pytest
import torch

from smelt import registry
from smelt.align import READS
from smelt.train import reads

METHODS = registry.names("align")


def log_probabilities(pairs: int = 7, scale: float = 30.0, seed: int = 0) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: -scale * torch.rand(pairs, generator=random, dtype=torch.float64) for name in READS}


def value(method, have: dict[str, torch.Tensor]) -> torch.Tensor:
    return method(**{name: have[name] for name in reads(method, READS)})


@pytest.fixture(params=METHODS)
def method(request):
    return registry.load("align", request.param)()


def test_it_reads_both_policies_and_only_what_there_is(method):
    assert {"policy_chosen", "policy_rejected"} <= set(reads(method, READS)) <= set(READS)


def test_one_loss_per_pair_and_pairs_do_not_mix(method):
    have = log_probabilities()
    loss = value(method, have)
    assert loss.shape == (7,) and loss.dtype == torch.float64
    for i in range(7):
        assert torch.equal(value(method, {name: x[i : i + 1] for name, x in have.items()}), loss[i : i + 1])


def test_at_the_reference_the_chosen_answer_is_pushed_up_and_the_rejected_one_down(method):
    have = log_probabilities()
    have["reference_chosen"], have["reference_rejected"] = have["policy_chosen"].clone(), have["policy_rejected"].clone()
    have["policy_chosen"].requires_grad_(), have["policy_rejected"].requires_grad_()
    value(method, have).sum().backward()
    assert (have["policy_chosen"].grad < 0).all() and (have["policy_rejected"].grad > 0).all()


def test_shifting_both_references_changes_nothing(method):
    have = log_probabilities()
    shifted = have | {name: have[name] + 5.0 for name in READS if name.startswith("reference_")}
    assert torch.allclose(value(method, shifted), value(method, have), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_loss_and_gradient_are_finite_and_exact(method, scale):
    """Also far from the reference, where sigmoids are 0 or 1; the gradient is that of the loss, and references get none."""
    have = log_probabilities(scale=scale)
    inputs = [have[name].requires_grad_() for name in ("policy_chosen", "policy_rejected")]
    loss = value(method, have)
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss.sum(), inputs))
    if scale == 1.0:

        def only(chosen, rejected):
            return value(method, have | {"policy_chosen": chosen, "policy_rejected": rejected})

        assert torch.autograd.gradcheck(only, inputs)
