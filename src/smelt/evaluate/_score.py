"""What a bound model answers to given ids: plain in one call, or through its cache in several.

Rows are padded on the right and causality keeps the padding from counting, so neither the size of a batch nor the
company of a row changes a score (beyond the rounding of a matrix product), but for attention that is `prompt_wide`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smelt.attention._mixer import MixerModule
from smelt.evaluate._text import room
from smelt.runtime import new_cache
from smelt.spec import SmeltError

__all__ = ["batches", "decoder", "log_probabilities", "logits", "query_likelihood", "sees_only_what_came", "windows"]

LOGITS = 1 << 28  # bytes of float32 logits of one call


def decoder(variant: Any, probe: str) -> Any:
    """The model, when it predicts next tokens and is ready for it. Raises SmeltError otherwise."""
    if variant.model.get_output_embeddings() is None:
        raise SmeltError(f"{probe} needs a model that predicts the next token; {type(variant.model).__name__} does not")
    if variant.model.training:
        raise SmeltError(f"{probe}: '{variant.name}' is in training mode, so dropout would move the scores; call model.eval()")
    return variant.model


def sees_only_what_came(variant: Any, probe: str) -> None:
    """Raises SmeltError for a model whose first tokens see each other: what it says of them is no prediction."""
    prefix = max((module.prefix for module in variant.model.modules() if isinstance(module, MixerModule)), default=1)
    if prefix > 1:
        raise SmeltError(
            f"{probe}: '{variant.name}' reads the first {prefix} tokens of a text both ways, so its figures there would be flattered; "
            f"measure it with position(first={prefix}), behind them"
        )


def logits(variant: Any, ids: Tensor, *, prefill: int, chunk: int, first: int = 0) -> Iterator[tuple[int, Tensor]]:
    """Yield (position of the first, logits [b, n, v]) for ids [b, t], the pieces in order, from position `first` on.

    Without a cache method one call. With one, a fresh cache: `prefill` tokens, then `chunk` at a time (one at a time
    where the layers keep different numbers of tokens), so that all but the first see what the cache has kept.
    """
    model = variant.model
    if variant.cache is None:
        with torch.no_grad():
            yield first, model(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        return
    cache = new_cache(model, variant.cache)
    step = chunk if variant.cache.equal_lengths else 1
    start, stop = 0, prefill
    while start < ids.shape[1]:
        with torch.no_grad():
            yield start, model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).logits
        start, stop = stop, stop + step


def batches(model: Any, rows: Sequence[Sequence[int]], batch: int) -> Iterator[tuple[list[int], Tensor]]:
    """(indices of rows, ids [b, t] padded on the right), rows of similar length together, at most 256 MB of logits."""
    vocabulary = model.get_output_embeddings().weight.shape[0]
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
    at = 0
    while at < len(order):
        longest = len(rows[order[at]])
        part = order[at : at + max(1, min(batch, LOGITS // (4 * vocabulary * max(1, longest))))]
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        for place, index in enumerate(part):
            ids[place, : len(rows[index])] = torch.tensor(rows[index])
        yield part, ids.to(model.device)
        at += len(part)


def log_probabilities(
    variant: Any,
    rows: Sequence[Sequence[int]],
    *,
    batch: int,
    prefill: int,
    chunk: int,
    last: Sequence[int] | None = None,
    read: Callable[[Tensor, Tensor, int], Tensor] | None = None,
) -> list[np.ndarray]:
    """For each row, log p(ids[i + 1] | ids[..i]) in nats, float64 [len - 1].

    With `last`, only that many at the end of each row are computed, and the others are 0.
    `read(logits [n, v], next ids [n], row) -> [n]` replaces the log-probability by another figure per position.
    """
    read = read or _log_probability
    inputs = [row[:-1] for row in rows]
    found = [np.zeros(len(row)) for row in inputs]
    skip = [0] * len(rows) if last is None else [len(row) - count for row, count in zip(inputs, last, strict=True)]
    for part, ids in batches(variant.model, inputs, batch):
        for start, piece in logits(variant, ids, prefill=prefill, chunk=chunk, first=min(skip[i] for i in part)):
            for place, index in enumerate(part):
                low, high = max(start, skip[index]), min(start + piece.shape[1], len(inputs[index]))
                if high > low:
                    following = torch.tensor(rows[index][low + 1 : high + 1], device=piece.device)
                    found[index][low:high] = read(piece[place, low - start : high - start], following, index).double().cpu().numpy()
    return found


def query_likelihood(variant: Any, asked: Sequence[Any], length: int, *, batch: int, prefill: int, chunk: int) -> list[np.ndarray]:
    """For each question (`query`, `passages`) sum_i log p(query_i | passage, query_<i) of its passages, cut to `length` tokens."""
    tokenizer, limit = variant.tokenizer, room(variant.model, 1 << 30)
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    rows, counts = [], []
    for one in asked:
        question = ids(one.query)[: limit // 2]
        for passage in one.passages:
            rows.append((start + ids(passage))[: min(length, limit - len(question))] + question)
            counts.append(len(question))
    scores = log_probabilities(variant, rows, batch=batch, prefill=prefill, chunk=chunk, last=counts)
    total = iter([float(score[-count:].sum()) for score, count in zip(scores, counts, strict=True)])
    return [np.array([next(total) for _ in one.passages]) for one in asked]


def _log_probability(scores: Tensor, following: Tensor, row: int) -> Tensor:
    return -torch.nn.functional.cross_entropy(scores.float(), following, reduction="none")


def windows(length: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, scored from) over positions 0 .. length - 1: inputs first .. last - 1 predict first + 1 .. last.

    Windows start at multiples of `stride`; each predicts the positions not predicted yet, so position p is predicted
    once, from at least min(p, context - stride) tokens.
    """
    first, done = 0, 1
    while done < length:
        last = min(first + context, length - 1)
        yield first, last, done
        first, done = first + stride, last + 1
