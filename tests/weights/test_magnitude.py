from __future__ import annotations

import pytest
import torch

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.magnitude import Magnitude


def slow(weight, sparsity, over):
    """Zero one smallest at a time."""
    result = weight.clone()
    pools = [result[i] for i in range(len(result))] if over == "row" else [result.view(-1)]
    for pool in pools:
        gone = set()
        for _ in range(round(sparsity * len(pool))):
            gone.add(min((i for i in range(len(pool)) if i not in gone), key=lambda i: abs(pool[i].item())))
        for i in gone:
            pool[i] = 0.0
    return result


@pytest.mark.parametrize("over", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.0, 0.29, 0.5, 0.95])
def test_equals_the_loop(sparsity, over):
    weight = torch.randn(7, 20)
    method = Magnitude(sparsity=sparsity, over=over)
    result = method(weight)
    assert torch.equal(result, slow(weight, sparsity, over))
    assert int((result == 0).sum()) == method.budget([(7, 20)])[0].zeros


def test_budget_is_exact_with_ties_and_awkward_fractions():
    weight = torch.ones(3, 100)
    assert ((Magnitude(sparsity=0.29)(weight) == 0).sum(1) == 29).all()  # int(0.29 * 100) is 28


def test_rows_are_pruned_evenly_only_when_asked():
    weight = torch.cat([torch.full((1, 10), 0.1), torch.full((1, 10), 5.0)]) * (1 + 0.01 * torch.rand(2, 10))
    assert (Magnitude(0.5)(weight) == 0).sum(1).tolist() == [5, 5]
    assert (Magnitude(0.5, over="matrix")(weight) == 0).sum(1).tolist() == [10, 0]


def test_outliers_change_the_mask_though_the_function_is_the_same(model, plant):
    """What activation-aware pruning is for: magnitudes alone see another matrix in the same function."""
    planted = plant(model)
    ids = torch.randint(2, 320, (2, 16))
    with torch.no_grad():
        torch.testing.assert_close(planted(ids).logits, model(ids).logits, rtol=0, atol=1e-4)
    masks = [Magnitude(0.5)(m.model.layers[0].self_attn.q_proj.weight.detach()) == 0 for m in (model, planted)]
    agreement = (masks[0] == masks[1]).float().mean().item()
    assert agreement < 0.95
    shrunk = planted.model.layers[0].input_layernorm.weight > 10
    assert shrunk.sum() == 6 and masks[1][:, shrunk].float().mean() > 0.9


def test_everything_cannot_go():
    with pytest.raises(SmeltError, match="sparsity"):
        parse("magnitude(sparsity=1.0)", "weights")
