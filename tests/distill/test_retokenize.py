from __future__ import annotations

import pytest
import torch

from smelt.distill._retokenize import Retokenizer
from smelt.model._tiny import tiny_tokenizer
from smelt.model.mistral import byte_level_bpe

TEXT = ["def f(x):\n    return x + 1\n", "import os\n", "for i in range(10):\n    print(i)\n"]


@pytest.fixture(scope="module")
def both():
    return tiny_tokenizer(), byte_level_bpe(["for name in range print return import os def " * 3] * 8, 290, 256)


def plain(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row(tokenizer, text, length, prompt=0):
    ids = plain(tokenizer, text)[: length + 1]
    made = {"input_ids": ids[:-1], "labels": [-100] * max(prompt - 1, 0) + ids[max(prompt, 1) :]}
    pad = length - len(made["input_ids"])
    return made["input_ids"] + [0] * pad, made["labels"] + [-100] * pad


def test_a_row_is_the_same_text_in_the_other_ids(both):
    student, teacher = both
    rows = [row(student, text, 30) for text in TEXT]
    inputs = {"input_ids": torch.tensor([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}
    made = Retokenizer(student, teacher, 256)(inputs)
    for i, text in enumerate(TEXT):
        expected = plain(teacher, text)
        n = len(expected)
        assert made["teacher_ids"][i, : n - 1].tolist() == expected[:-1]
        assert made["teacher_labels"][i, : n - 1].tolist() == expected[1:]
        assert made["teacher_keep"][i].tolist() == [True] * (n - 1) + [False] * (made["teacher_keep"].shape[1] - n + 1)


def test_the_end_of_a_text_stays_one_token(both):
    student, teacher = both
    ids = [*plain(student, TEXT[0]), student.eos_token_id, *plain(student, TEXT[1]), student.eos_token_id]
    assert Retokenizer(student, teacher, 256).read(ids) == [
        *plain(teacher, TEXT[0]), teacher.eos_token_id, *plain(teacher, TEXT[1]), teacher.eos_token_id
    ]  # fmt: skip


def test_only_the_tokens_of_the_answer_count(both):
    student, teacher = both
    prompt = len(plain(student, TEXT[0]))
    ids, labels = row(student, TEXT[0] + TEXT[1], 40, prompt)
    made = Retokenizer(student, teacher, 256)({"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels])})
    counted = made["teacher_labels"][0][made["teacher_keep"][0]].tolist()
    answer = [token for token in labels if token != -100]
    assert teacher.decode(counted) == student.decode(answer)
    assert counted == plain(teacher, student.decode(answer))


def test_rows_are_cut_to_the_teachers_context_and_equal_tokenizers_change_nothing(both):
    student, teacher = both
    rows = [row(student, text, 30) for text in TEXT]
    inputs = {"input_ids": torch.tensor([r[0] for r in rows]), "labels": torch.tensor([r[1] for r in rows])}
    assert Retokenizer(student, teacher, 6)(inputs)["teacher_ids"].shape == (3, 6)
    same = Retokenizer(student, student, 256)(inputs)
    width = same["teacher_ids"].shape[1]
    keep = inputs["labels"][:, :width] != -100
    assert torch.equal(same["teacher_keep"], keep)
    assert torch.equal(same["teacher_labels"][keep], inputs["labels"][:, :width][keep])
    assert torch.equal(same["teacher_ids"][keep], inputs["input_ids"][:, :width][keep])
