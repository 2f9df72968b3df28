from __future__ import annotations

import pytest

from smelt.distill import Composed
from smelt.distill._holding import reading, token_divergence
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.spec import SmeltError


class Made(Composed):
    def __init__(self, *names):
        self.names = names

    @property
    def reads(self):
        return self.names

    def __call__(self, **tensors):
        raise NotImplementedError


def test_reading_is_what_the_call_names_or_what_a_composed_one_says():
    assert reading(ForwardKL()) == ("student", "teacher")
    assert reading(CrossEntropy()) == ("student", "labels")
    assert reading(Made("student", "progress")) == ("student", "progress")
    assert reading(ForwardKL) == reading("forward_kl") == reading(None) == ()


@pytest.mark.parametrize("good", [ForwardKL(), ReverseKL(2.0), Made("teacher", "student")])
def test_a_divergence_of_student_and_teacher_is_taken(good):
    token_divergence(good, "taid: objective")


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (CrossEntropy(), "CrossEntropy, which reads student, labels"),
        (Made("student", "teacher", "equipment"), "Made, which reads student, teacher, equipment"),
        (Made("student"), "Made, which reads student"),
        ("forward_kl", "the text 'forward_kl'"),
        (ForwardKL, "the class ForwardKL"),
        (3, "int, which is no objective"),
        (None, "NoneType, which is no objective"),
    ],
)
def test_anything_else_is_refused_in_one_clear_line(bad, said):
    with pytest.raises(SmeltError, match=r"^taid: objective is .*such as forward_kl") as error:
        token_divergence(bad, "taid: objective")
    assert said in str(error.value)
