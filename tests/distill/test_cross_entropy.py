from __future__ import annotations

import math

import pytest
import torch

from smelt.distill.cross_entropy import CrossEntropy


def test_equals_the_slow_formula_and_its_gradient():
    student = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(7, (2, 3))
    loss = CrossEntropy()(student, labels)
    for i in range(2):
        for t in range(3):
            z = student[i, t].tolist()
            assert loss[i, t].item() == pytest.approx(math.log(sum(map(math.exp, z))) - z[labels[i, t]], rel=1e-12)
    loss.sum().backward()
    expected = student.detach().softmax(-1) - torch.nn.functional.one_hot(labels, 7)
    torch.testing.assert_close(student.grad, expected)


def test_is_float32_from_half_precision():
    student, labels = torch.randn(5, 7).bfloat16(), torch.randint(7, (5,))
    torch.testing.assert_close(CrossEntropy()(student, labels), CrossEntropy()(student.float(), labels))
