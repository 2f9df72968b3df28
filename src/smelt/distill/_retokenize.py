"""The same text in another tokenizer's ids: what a teacher of another vocabulary reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smelt.spec import SmeltError

__all__ = ["Retokenizer"]

PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


class Retokenizer:
    """`retokenizer(inputs)` -> {"teacher_ids", "teacher_labels", "teacher_keep"} [b, s], padded on the right.

    The text of a row is decoded and read by the teacher's tokenizer; an end-of-text token stays one. Where a row starts
    with masked positions (a prompt), prompt and answer are read apart, so that the answer's tokens are exactly those that
    count. s is the longest of the batch, at most `context`. A row that starts or ends within a character of several bytes
    has a replacement character there.
    """

    def __init__(self, student: Any, teacher: Any, context: int):
        if teacher.eos_token_id is None:
            raise SmeltError("the teacher's tokenizer has no end-of-text token (eos_token)")
        self.student, self.teacher, self.context = student, teacher, context

    def __call__(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        found = []
        for ids, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True):
            kept = [at for at, label in enumerate(labels) if label != -100]
            first, end = (kept[0], kept[-1] + 1) if kept else (0, len(ids))
            whole = ids[:end] + labels[end - 1 : end] if kept else ids
            cut = first + 1 if first else 0
            prompt, answer = (self.read(part) for part in (whole[:cut], whole[cut:]))
            found.append((prompt + answer, max(len(prompt), 1) if kept else len(whole)))
        length = min(max((len(ids) for ids, _ in found), default=2), self.context + 1)
        shape, device = (len(found), max(length, 2)), inputs["input_ids"].device
        rows = torch.full(shape, self.teacher.eos_token_id)
        keep = torch.zeros(shape, dtype=torch.bool)
        for row, (ids, first) in enumerate(found):
            ids = ids[: shape[1]]
            rows[row, : len(ids)] = torch.tensor(ids)
            keep[row, first : len(ids)] = True
        made = {"teacher_ids": rows[:, :-1], "teacher_labels": rows[:, 1:], "teacher_keep": keep[:, 1:]}
        return {name: value.contiguous().to(device) for name, value in made.items()}

    def read(self, ids: list[int]) -> list[int]:
        """Ids of the student -> ids of the teacher for the same text."""
        made: list[int] = []
        start = 0
        for at in [*(i for i, token in enumerate(ids) if token == self.student.eos_token_id), len(ids)]:
            text = self.student.decode(ids[start:at], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if text:
                made += self.teacher(text, **PLAIN)["input_ids"]
            if at < len(ids):
                made.append(self.teacher.eos_token_id)
            start = at + 1
        return made
