"""Examples from files, rows of prompt and answer for the training loop, and how likely a model finds an answer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset

from smelt.distill import Composed
from smelt.distill._divergence import wide
from smelt.distill._holding import reading
from smelt.recipe import Training
from smelt.spec import SmeltError, nearest

__all__ = ["Batches", "Epochs", "Pair", "Weighed", "encode", "judged", "likelihood", "paired", "read_examples", "share", "shuffled"]

PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False, "verbose": False}


class Pair(NamedTuple):
    """Token ids: what is read, and what is to be said."""

    prompt: list[int]
    answer: list[int]


def read_examples(file: str, fields: Sequence[str], optional: Sequence[str] = ()) -> list[dict[str, str]]:
    """The rows of a .jsonl file: {field: text}, further columns ignored. Raises SmeltError with the line it cannot use."""
    found = []
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    found.append(_row(line, fields, optional, file, number))
    except OSError as error:
        raise SmeltError(f"examples: cannot be read: {error.strerror}", file=file) from None
    if not found:
        raise SmeltError("examples: the file has no rows", file=file)
    return found


def _row(line: bytes, fields: Sequence[str], optional: Sequence[str], file: str, number: int) -> dict[str, str]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise SmeltError(f"examples: not a line of JSON in UTF-8: {error}", file=file, line=number) from None
    if not isinstance(row, dict):
        raise SmeltError(f"examples: a JSON object with {', '.join(map(repr, fields))} is expected", file=file, line=number)
    for name in (*fields, *(name for name in optional if row.get(name) is not None)):
        if name not in row:
            raise SmeltError(f"examples: '{name}' is missing{nearest(name, map(str, list(row)[:8]))}", file=file, line=number)
        text = row[name]
        if not isinstance(text, str):
            raise SmeltError(f"examples: '{name}' is a {type(text).__name__}, it should be a string", file=file, line=number)
        if not text.strip():
            raise SmeltError(f"examples: '{name}' is empty", file=file, line=number)
        if any("\ud800" <= c <= "\udfff" for c in text):
            raise SmeltError(f"examples: '{name}' holds half of a surrogate pair, which is no text", file=file, line=number)
    return {name: row[name] for name in (*fields, *optional) if row.get(name) is not None}


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, **PLAIN)["input_ids"])


def paired(tokenizer: Any, prompt: str, answer: str, room: int) -> Pair | None:
    """Both tokenized apart, as they are when the model is asked, and the end of text; at most `room` ids, or None.

    A prompt that is too long loses its beginning; None where the answer alone fills the room.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise SmeltError("the tokenizer has no end-of-text token (eos_token), so an answer cannot end")
    before, said = encode(tokenizer, prompt) or [end], [*encode(tokenizer, answer), end]
    return Pair(before[-(room - len(said)) :], said) if len(said) < room else None


class Epochs:
    """`at(i)`: the i-th of n things, visited in a new random order every epoch; follows from (seed, i)."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self._epoch, self._order = n, seed, -1, np.zeros(0, np.int64)

    def at(self, index: int) -> int:
        epoch, place = divmod(index, self.n)
        if epoch != self._epoch:
            self._order, self._epoch = np.random.default_rng([self.seed, epoch]).permutation(self.n), epoch
        return int(self._order[place])


Row = tuple[list[int], int]  # ids, and where those that count begin (at least 1)


class Batches(Dataset):
    """Rows that are made batch by batch: `input_ids`, `labels` [context], and `weights` [], a factor of the row's losses.

    `make(b)` gives the rows of the b-th optimizer step, the same however often it is asked; `weigh(lengths)` the factors
    from the numbers of tokens that count in each row. Labels are -100 before what counts and on the padding (on the right).
    """

    def __init__(self, make: Callable[[int], list[Row]], weigh: Callable[[list[int]], list[float]], settings: Training, padding: int):
        self.make, self.weigh, self.padding = make, weigh, padding
        self.batch, self.context, self.count = settings.batch, settings.context, settings.steps * settings.batch
        self._at = -1
        self._rows: list[Row] = []
        self._weights: list[float] = []

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        step, place = divmod(index, self.batch)
        if step != self._at:
            self._rows = self.make(step)
            self._weights, self._at = self.weigh([len(ids) - first for ids, first in self._rows]), step
        ids, first = self._rows[place]
        row, labels, tokens = torch.full((self.context,), self.padding), torch.full((self.context,), -100), torch.tensor(ids)
        row[: len(ids) - 1] = tokens[:-1]
        labels[first - 1 : len(ids) - 1] = tokens[first:]
        return {"input_ids": row, "labels": labels, "weights": torch.tensor(self._weights[place])}


def shuffled(pairs: Sequence[Pair], settings: Training, seed: int, padding: int) -> Batches:
    """Rows of prompt and answer, epoch by epoch in random order; only answers count, every token alike."""
    order = Epochs(len(pairs), seed)

    def make(step: int) -> list[Row]:
        chosen = [pairs[order.at(step * settings.batch + at)] for at in range(settings.batch)]
        return [(pair.prompt + pair.answer, len(pair.prompt)) for pair in chosen]

    return Batches(make, lambda lengths: [1.0] * len(lengths), settings, padding)


class Weighed(Composed):
    """loss[b, t] = w[b] objective[b, t]: the losses of another objective times the weights of their rows.

    The loop divides by all the kept tokens N of a step, so w = share N / n_k makes k's part of the loss a mean over its own
    n_k tokens. The rows carry them as "weights".
    """

    def __init__(self, objective: Any):
        self.objective, self.names = objective, reading(objective)

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.names, "keep", "weights")))  # reading `keep` leaves every position in its row

    def __call__(self, *, weights: Tensor, **have: Any) -> Tensor:
        return self.objective(**{name: have[name] for name in self.names}) * weights[:, None]


def likelihood(loaded: Any, pairs: Sequence[Pair]) -> Tensor:
    """log p(answer | prompt) of each pair in nats, [n]: one forward over prompt and answer."""
    return judged(loaded, pairs)[0]


@torch.no_grad()
def judged(loaded: Any, pairs: Sequence[Pair], rows: int = 64) -> tuple[Tensor, Tensor]:
    """(log p(answer | prompt) [n] in nats, is it the greedy answer [n] bool): `rows` pairs of like length in one forward."""
    model, training = loaded.model, loaded.model.training
    total, greedy = torch.zeros(len(pairs)), torch.zeros(len(pairs), dtype=torch.bool)
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt) + len(pairs[i].answer))
    model.eval()
    for at in range(0, len(order), rows):
        part = order[at : at + rows]
        width = max(len(pairs[i].prompt) + len(pairs[i].answer) for i in part)
        ids, labels = torch.zeros(len(part), width, dtype=torch.long), torch.full((len(part), width - 1), -100)
        for row, i in enumerate(part):
            prompt, answer = pairs[i]
            ids[row, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
            labels[row, len(prompt) - 1 : len(prompt) + len(answer) - 1] = torch.tensor(answer)
        logits, labels = wide(model(input_ids=ids[:, :-1].to(model.device), use_cache=False).logits), labels.to(model.device)
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
        total[part] = -loss.view(labels.shape).sum(-1).float().cpu()
        greedy[part] = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1).cpu()
    model.train(training)
    return total, greedy


def share(text: str) -> float:
    """In [0, 1), by the text alone: what decides whether a row is held out, so that copies stay together."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64
