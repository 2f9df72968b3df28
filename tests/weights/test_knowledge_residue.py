from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.registry import parse
from smelt.spec import SmeltError
from smelt.weights.knowledge_residue import KnowledgeResidue
from smelt.weights.ties import Ties


def slow(base, coarse, instruct, density, scale):
    change = [c - b for c, b in zip(coarse.flatten().tolist(), base.flatten().tolist())]
    kept = sorted(range(len(change)), key=lambda i: (-abs(change[i]), i))[: round(density * len(change))]
    result = instruct.double().flatten()
    for i in kept:
        result[i] += scale * change[i]
    return result.view_as(base)


@pytest.mark.parametrize("density", [0.2, 0.55, 1.0])
@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_equals_the_loop(density, scale):
    base, coarse, instruct = (torch.randn(5, 9) for _ in range(3))
    made = KnowledgeResidue(density=density, scale=scale)("w", [coarse, instruct], base)
    assert_close(made.double(), slow(base, coarse, instruct, density, scale), rtol=0, atol=2e-6)


def test_nothing_added_is_the_instruct_model_bit_for_bit():
    for dtype in (torch.float32, torch.bfloat16):
        base, coarse, instruct = (torch.randn(40).to(dtype) for _ in range(3))
        assert torch.equal(KnowledgeResidue(scale=0.0)("w", [coarse, instruct], base), instruct)
        assert torch.equal(KnowledgeResidue()("w", [base, instruct], base), instruct)


def test_onto_the_base_it_is_the_coarse_model_and_ties_with_one_task_vector():
    base, coarse = torch.randn(40), torch.randn(40)
    whole = KnowledgeResidue(density=1.0)("w", [coarse, base], base)
    assert_close(whole, coarse, rtol=0, atol=1e-6)
    assert_close(KnowledgeResidue()("w", [coarse, base], base), Ties()("w", [coarse], base), rtol=0, atol=1e-6)


def test_exactly_the_share_is_changed():
    base, coarse, instruct = (torch.randn(100) for _ in range(3))
    made = KnowledgeResidue(density=0.29)("w", [coarse, instruct], base)
    assert int((made != instruct).sum()) == 29


def test_one_instruct_model():
    with pytest.raises(SmeltError, match="names 2"):
        parse("knowledge_residue(models=['a', 'b'])", "weights")
