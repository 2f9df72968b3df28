from __future__ import annotations

import math

import pytest
import torch

from smelt import registry
from smelt.distill._preferring import Preferring, preferring
from smelt.distill.cross_entropy import CrossEntropy
from smelt.spec import SmeltError

DPO = registry.parse("dpo(beta=0.3)", "align")


def tensors(seed=0):
    made = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 6, 7, generator=made, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(7, (4, 6), generator=made)
    keep = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]]).bool()
    return student, teacher, labels, keep


def test_the_step_is_the_mean_over_pairs_of_the_slow_loss():
    student, teacher, labels, keep = tensors()
    objective, count = Preferring(DPO), int(keep.sum())
    objective.change({"weights": torch.full((4,), count / 2, dtype=torch.float64)})
    loss = objective(student, teacher, labels, keep, labels)
    got = torch.where(keep, loss, 0.0).sum() / count
    total = 0.0
    for pair in range(2):
        log = []
        for logits in (student, teacher):
            for row in (2 * pair, 2 * pair + 1):
                log.append(sum(logits[row, t].log_softmax(-1)[labels[row, t]].item() for t in range(6) if keep[row, t]))
        h = 0.3 * ((log[0] - log[2]) - (log[1] - log[3]))
        total += math.log1p(math.exp(-h)) / 2
    assert got.item() == pytest.approx(total, rel=1e-12)


def test_chosen_goes_up_and_rejected_down():
    student, teacher, labels, keep = tensors()
    objective = Preferring(DPO)
    student.requires_grad_()
    torch.where(keep, objective(student, teacher, labels, keep, labels), 0.0).sum().backward()
    own = student.grad.gather(-1, labels[..., None])[..., 0]
    sign = torch.tensor([-1.0, 1.0, -1.0, 1.0])[:, None].expand(4, 6)
    assert (own[keep].sign() == sign[keep]).all()
    assert not student.grad[~keep].any()


def test_what_is_no_preference_objective_is_refused():
    preferring(DPO, "here")
    for wrong in (CrossEntropy(), "dpo", type(DPO), None):
        with pytest.raises(SmeltError, match=r"here: .* such as dpo"):
            preferring(wrong, "here")
