"""Many prompts read in few calls. Rows of a batch are padded on the right: a causal model cannot see that, so no mask is needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smelt.spec import SmeltError

__all__ = ["at_once", "batches", "last_logits", "needs_decoder", "needs_model", "room"]

TOKENS = 1 << 13  # of one call, padding included


def at_once(model: Any) -> int:
    """Tokens of one forward, padding included. On a CPU what stays in its caches from one operator to the next."""
    return 1 << 11 if model.model.device.type == "cpu" else TOKENS


def room(model: Any) -> int:
    """Tokens the model reads at once."""
    return int(model.model.config.get_text_config().max_position_embeddings)


def needs_model(model: Any, name: str) -> None:
    if model is None:
        raise SmeltError(f"{name} needs a model and was given none; give it 'embedded', a folder or a hub id")


def needs_decoder(model: Any, name: str) -> None:
    if model is None or not model.model.can_generate():
        kind = "none" if model is None else type(model.model).__name__
        raise SmeltError(f"{name} needs a decoder as its model and was given {kind}")


def batches(lengths: Sequence[int], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Which rows are read together: of near lengths, at most `tokens` with their padding, at least one."""
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda r: -lengths[r]):  # the longest first: too little memory shows at once
        if batch and lengths[batch[0]] * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def last_logits(model: Any, rows: Sequence[Sequence[int]], tokens: int | None = None) -> list[Tensor]:
    """Of each row of ids (at least one) the logits [vocabulary] after its last token, float32 on CPU. Raises SmeltError where not finite.

    Cost: one forward over all rows, and the head at as many places as a batch has lengths.
    """
    found: list[Tensor] = [torch.empty(0)] * len(rows)
    device = model.model.device
    for batch in batches([len(r) for r in rows], tokens or at_once(model)):
        width = len(rows[batch[0]])
        ids = torch.zeros(len(batch), width, dtype=torch.long)
        for at, row in enumerate(batch):
            ids[at, : len(rows[row])] = torch.tensor(rows[row])
        ends = sorted({len(rows[row]) - 1 for row in batch})
        logits = model.model(input_ids=ids.to(device), use_cache=False, logits_to_keep=torch.tensor(ends, device=device)).logits
        for at, row in enumerate(batch):
            found[row] = logits[at, ends.index(len(rows[row]) - 1)].float().cpu()
    return found
