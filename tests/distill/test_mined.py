from __future__ import annotations

import numpy as np
import pytest
import torch

from smelt.distill._alignment import END, distances, warped
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.mined import MinED, _Spelling, partners
from smelt.distill.reverse_kl import ReverseKL
from smelt.spec import SmeltError

STUDENT = [END, b"a", b"b", b"c", b" ", b"ab", b"bc"]
TEACHER = [END, b"c", b"b", b"a", b" ", b"abc", b"bc", b"ca", b""]


def random(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(side, *texts):
    """Padded rows of ids for lists of tokens -> (ids, keep): the last token of a row is a label only."""
    length = max(map(len, texts))
    ids, keep = torch.zeros(len(texts), length, dtype=torch.long), torch.zeros(len(texts), length, dtype=torch.bool)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor([side.index(token) for token in text])
        keep[row, : len(text)] = True
    return ids, keep


MINE = [[b"a", b"bc", b" ", b"ab", b"c", b" ", b"b"], [b"b", b"a", b" "]]
THEIRS = [[b"a", b"bc", b" ", b"abc", b" ", b"b"], [b"b", b"a", b" "]]


@pytest.fixture
def have():
    ids, keep = rows(STUDENT, *MINE)
    teacher_ids, kept = rows(TEACHER, *THEIRS)
    keep[0, 0] = kept[0, 0] = False  # a prompt
    made = {"student": random(2, 7, len(STUDENT)), "labels": ids.roll(-1, 1), "keep": keep, "student_ids": ids}
    made |= {"teacher": random(2, 6, len(TEACHER), seed=1), "teacher_ids": teacher_ids, "teacher_keep": kept}
    return made | {"equipment": _Spelling(STUDENT, TEACHER)}


def test_every_token_of_the_teacher_goes_to_the_one_spelt_most_alike():
    # by hand: abc is one change from ab and bc, ca one from a and c; of equals the first of the student's
    assert _Spelling(STUDENT, TEACHER).nearest.tolist() == [0, 3, 2, 1, 4, 5, 6, 1, -1]


def test_positions_stand_beside_those_of_the_same_text(have):
    found = partners(have["equipment"], have["student_ids"], have["keep"], have["teacher_ids"], have["teacher_keep"])
    # 'abc' is read as 'ab', 'c' by the student: 'ab' is where it is mapped to, 'c' has no partner of its own
    assert found[1].tolist() == [0, 1, 2, -1, -1, -1, -1]
    assert found[0, :3].tolist() == [-1, 1, 2]
    assert found[0, 4].item() == -1
    assert found[0, 5:].tolist() == [4, 5]


def slow(have, divergence, rate):
    loss = CrossEntropy()(have["student"], have["labels"]).clone()
    nearest = have["equipment"].nearest.tolist()
    for b in range(2):
        mine = [t for t in range(7) if have["keep"][b, t]]
        theirs = [t for t in range(6) if have["teacher_keep"][b, t]]
        ids, teacher_ids = have["student_ids"][b].tolist(), have["teacher_ids"][b].tolist()
        cost = distances([STUDENT[ids[t]] for t in mine], [TEACHER[teacher_ids[t]] for t in theirs])
        match = warped(cost[None], np.array([len(mine)]), np.array([len(theirs)]))[0]
        for t, k in zip(mine, match.tolist(), strict=True):
            if k < 0 or nearest[teacher_ids[theirs[k]]] != ids[t]:
                continue
            logits = torch.full((len(STUDENT),), -1e5, dtype=torch.float64)
            for w, v in enumerate(nearest):
                if v >= 0:
                    logits[v] = max(logits[v], have["teacher"][b, theirs[k], w])
            apart = divergence(student=have["student"][b, t], teacher=logits)
            loss[b, t] = (1 - rate) * loss[b, t] + rate * apart
    return loss


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
def test_equals_the_slow_one_and_its_gradient_is_right(have, divergence):
    method = MinED(divergence=divergence, rate=0.3)
    torch.testing.assert_close(method(**have), slow(have, divergence, 0.3), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(method(**have), CrossEntropy()(have["student"], have["labels"]))
    assert torch.autograd.gradcheck(lambda z: method(**(have | {"student": z})), have["student"].requires_grad_())


def test_with_one_vocabulary_it_is_the_divergence_itself(have):
    keep = have["keep"]
    same = {"teacher": random(2, 7, len(STUDENT), seed=4), "teacher_ids": have["student_ids"], "teacher_keep": keep}
    same |= {"equipment": _Spelling(STUDENT, STUDENT)}
    loss = MinED(rate=1.0)(**(have | same))
    torch.testing.assert_close(loss[keep], ForwardKL()(have["student"], same["teacher"])[keep])
    assert not MinED(rate=1.0)(**(have | same | {"teacher": have["student"]}))[keep].any()


def test_what_is_held_must_be_a_divergence():
    for wrong in (CrossEntropy(), "forward_kl", MinED):
        with pytest.raises(SmeltError, match="mined: divergence"):
            MinED(divergence=wrong)
