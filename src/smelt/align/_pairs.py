"""From preference rows to padded pairs, from a pair to the log-probabilities of its answers, and the step the loop takes.

A row is {prompt, chosen, rejected}, three strings, as in TRL's explicit-prompt format. Prompt and answer are
tokenized together and an end-of-text token is added, which is learned too. The answer begins at the first token in
which the prompt alone and prompt with answer differ, so a token merged across the border belongs to the answer.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from smelt.spec import SmeltError

__all__ = ["Pair", "Pairs", "answers", "continuations", "preference_step", "read_pairs"]

FIELDS = ("prompt", "chosen", "rejected")


class Pair(NamedTuple):
    prompt: str
    chosen: str
    rejected: str


def read_pairs(file: Path) -> Iterator[Pair]:
    """The pairs of a JSONL file, further columns ignored. Raises SmeltError with the number of a line it cannot use."""
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _pair(line, str(file), number)
    except OSError as error:
        raise SmeltError(f"cannot be read: {error.strerror}", file=str(file)) from None


def _pair(line: bytes, file: str, number: int) -> Pair:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SmeltError(f"not a line of JSON in UTF-8: {error}", file=file, line=number) from None
    if not isinstance(row, dict):
        raise SmeltError('a JSON object {"prompt": ..., "chosen": ..., "rejected": ...} is expected', file=file, line=number)
    for name in FIELDS:
        if name not in row:
            raise SmeltError(f"'{name}' is missing; there is {', '.join(map(repr, list(row)[:8])) or 'nothing'}", file=file, line=number)
        text = row[name]
        if not isinstance(text, str):
            raise SmeltError(f"'{name}' is a {type(text).__name__}, it should be a string", file=file, line=number)
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise SmeltError(f"'{name}' holds half of a surrogate pair, which is no text", file=file, line=number)
    return Pair(*(row[name] for name in FIELDS))


def continuations(texts: Iterable[str], seed: int, prompt_lines: int = 8, answer_lines: int = 4) -> list[Pair]:
    """Pairs from plain text: a prompt's true next lines against those of another prompt, about as long, so that length tells nothing."""
    found, size = [], prompt_lines + answer_lines
    for text in texts:
        lines = text.splitlines(keepends=True)
        for start in range(0, len(lines) - size + 1, size):
            prompt, answer = "".join(lines[start : start + prompt_lines]), "".join(lines[start + prompt_lines : start + size])
            if prompt.strip() and answer.strip():
                found.append((prompt, answer))
    shuffled = random.Random(seed)
    shuffled.shuffle(found)
    found.sort(key=lambda pair: len(pair[1]))  # keeps the random order among equals
    partner = [i ^ 1 if i ^ 1 < len(found) else i - 1 for i in range(len(found))]
    pairs = [Pair(prompt, answer, found[other][1]) for (prompt, answer), other in zip(found, partner, strict=True)]
    shuffled.shuffle(pairs)
    return pairs


class Pairs(Dataset):
    """One pair per index: `input_ids`, `attention_mask`, `targets` [2, context], chosen first, and `labels` [].

    `targets` are the next tokens, already shifted, -100 on the prompt and the padding (on the right). `labels` is one
    number that is not -100: the loop counts those to know by how many items it divides, and the items are pairs.
    Too long: the prompt loses its beginning, both answers keep the same part of it. A pair with an answer that fills
    the context alone is left out, and so is one with equal answers; `dropped` counts both. Epochs are random
    orders that follow from (seed, index). Memory: the token ids, 4 bytes each.

    Raises SmeltError when no pair is left, or the tokenizer has no end-of-text token.
    """

    def __init__(self, pairs: Iterable[Pair], tokenizer: Any, context: int, count: int, seed: int):
        if tokenizer.eos_token_id is None:
            raise SmeltError("the tokenizer has no end-of-text token (eos_token), so an answer cannot end")
        self.context, self.count, self.seed = context, count, seed
        self.padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self.dropped = {"equal answers": 0, "answer too long": 0}
        self.rows: list[tuple[tuple[np.ndarray, int], ...]] = []  # ((ids, where the answer begins) of chosen, of rejected)
        for pair in pairs:
            if pair.chosen == pair.rejected:
                self.dropped["equal answers"] += 1
                continue
            both = [_tokens(tokenizer, pair.prompt, answer) for answer in (pair.chosen, pair.rejected)]
            room = context + 1 - max(len(ids) - begin for ids, begin in both)  # for the prompt; the last token is only a target
            if room < 1:
                self.dropped["answer too long"] += 1
                continue
            self.rows.append(tuple(_cut(ids, begin, room, tokenizer.bos_token_id) for ids, begin in both))
        if not self.rows:
            raise SmeltError(f"no preference pair is left for a context of {context} tokens; left out: {self.dropped}")
        self._epoch, self._order = -1, np.zeros(0, np.int64)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        epoch, at = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._order, self._epoch = np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)), epoch
        item = {
            "input_ids": torch.full((2, self.context), self.padding),
            "attention_mask": torch.zeros(2, self.context, dtype=torch.long),
            "targets": torch.full((2, self.context), -100),
            "labels": torch.tensor(1),
        }
        for side, (ids, begin) in enumerate(self.rows[self._order[at]]):
            tokens = torch.from_numpy(ids.astype(np.int64))
            item["input_ids"][side, : len(ids) - 1] = tokens[:-1]
            item["attention_mask"][side, : len(ids) - 1] = 1
            item["targets"][side, begin - 1 : len(ids) - 1] = tokens[begin:]
        return item


def _tokens(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], int]:
    """(ids of prompt, answer and end of text; index of the answer's first token, at least 1)."""
    end = tokenizer.eos_token_id
    alone, ids = (tokenizer(text, verbose=False)["input_ids"] for text in (prompt, prompt + answer))
    ids = ids[:-1] if ids and ids[-1] == end and not (prompt + answer).endswith(tokenizer.eos_token) else ids
    begin = 0
    while begin < min(len(alone), len(ids)) and alone[begin] == ids[begin]:
        begin += 1
    if begin == 0:  # something must stand before the first token that is predicted
        ids, begin = [end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, *ids], 1
    return [*ids, end], begin


def _cut(ids: list[int], begin: int, room: int, first: int | None) -> tuple[np.ndarray, int]:
    """At most `room` tokens before the answer: the last ones, after the opening token where there is one."""
    prompt = ids[:begin]
    if begin > room:
        opening = prompt[:1] if first is not None and prompt[0] == first and room > 1 else []
        prompt = opening + prompt[begin - room + len(opening) :]
    return np.asarray(prompt + ids[begin:], np.int32), len(prompt)


def answers(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """log p(answer | prompt) = sum over the answer's tokens, [b, 2] in nats: chosen, rejected. Columns of padding are not computed."""
    longest = int(inputs["attention_mask"].sum(-1).max())
    ids, mask, targets = (inputs[name].flatten(0, 1)[:, :longest] for name in ("input_ids", "attention_mask", "targets"))
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-100, reduction="none")
    return -loss.view(targets.shape).sum(-1).view(-1, 2)


def preference_step(objective: Callable[..., Tensor], reading: tuple[str, ...], reference: Any = None):
    """The step of a preference objective for the loop: (model, inputs, progress) -> (loss [b], keep [b]).

    `reference` is a frozen copy of the policy in eval mode, read only when the objective asks for it.
    """
    needed = any(name.startswith("reference_") for name in reading)
    if needed and reference is None:
        raise SmeltError(f"{type(objective).__name__} compares with a reference model, and there is none")
    if needed and reference.training:
        raise SmeltError("the reference model is in training mode, so dropout would disturb it; call reference.eval()")

    def step(model: Any, inputs: dict[str, Tensor], progress: float) -> tuple[Tensor, Tensor]:
        if model is reference:
            raise SmeltError("policy and reference are the same model, so nothing would be learned; load the reference once more")
        policy = answers(model, inputs)
        have = {"policy_chosen": policy[:, 0], "policy_rejected": policy[:, 1]}
        if needed:
            with torch.no_grad():
                frozen = answers(reference, inputs)
            have |= {"reference_chosen": frozen[:, 0], "reference_rejected": frozen[:, 1]}
        loss = objective(**{name: have[name] for name in reading})
        return loss, torch.ones_like(loss, dtype=torch.bool)

    return step
