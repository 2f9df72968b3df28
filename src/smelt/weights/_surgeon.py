"""What a change of a few weights of one map does to the loss of the model, to second order, from gradients per row of text.

With g_n the gradient of row n's loss, g = mean g_n and H = mean g_n g_n^T (the empirical Fisher of whole rows):
    L(w - d) - L(w)  ~  - g.d + d^T H d / 2
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

__all__ = ["expected", "losses", "per_row", "quadratic", "stacked", "traced"]


def stacked(batches: list[Mapping[str, Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(ids, mask) [rows, t] of all batches, padded on the right to the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    ids, mask = (
        torch.cat([pad(batch[key], (0, longest - batch[key].shape[1])) for batch in batches]).to(device)
        for key in ("input_ids", "attention_mask")
    )
    return ids, mask


def losses(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """Nats per token of each row [n]; ids and mask [n, t]. Padding is neither predicted nor predicted from."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    counts = mask[:, 1:] * mask[:, :-1]
    each = cross_entropy(logits.mT, ids[:, 1:], reduction="none") * counts
    return each.sum(1) / counts.sum(1).clamp(min=1)


def traced(model: Any, linear: nn.Linear, ids: Tensor, mask: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """(inputs [n, t, in], gradient of each row's loss for the map's outputs [n, t, out], losses [n]), `batch` rows at a time.

    The graph begins at the map's output, so nothing before it is differentiated, and no weight has a gradient.
    """
    found: list[tuple[Tensor, Tensor]] = []

    def catch(_: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
        found.append((given[0].detach(), made.detach().requires_grad_()))
        return found[-1][1]

    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = linear.register_forward_hook(catch)
    try:
        with _fixed(model), torch.enable_grad():
            for rows, keep in zip(ids.split(batch), mask.split(batch), strict=True):
                found.clear()
                loss = losses(model, rows, keep)
                (slope,) = torch.autograd.grad(loss.sum(), found[0][1])
                parts.append((found[0][0], slope, loss.detach()))
    finally:
        handle.remove()
    inputs, slopes, loss = (torch.cat(part) for part in zip(*parts, strict=True))
    return inputs, slopes, loss


@contextmanager
def _fixed(model: nn.Module) -> Iterator[None]:
    learned = [p for p in model.parameters() if p.requires_grad]
    for p in learned:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in learned:
            p.requires_grad_(True)


def per_row(inputs: Tensor, slopes: Tensor, chosen: Tensor) -> Tensor:
    """Gradient of each row's loss for the weights `chosen` [B] (out * columns + in): sum_t slope[n, t, out] x[n, t, in].

    [n, B] float64. Memory: 12 n t B bytes.
    """
    columns = inputs.shape[2]
    return (slopes[:, :, chosen // columns].float() * inputs[:, :, chosen % columns].float()).sum(1).double()


def quadratic(was: Tensor, delta: Tensor, gradients: Tensor, slope: float, ridge: float) -> tuple[Tensor, Tensor]:
    """(Q [B, B], c) with x^T Q x + c = d^T H d / 2 - slope g.d + ridge |d|^2 for x in {0, 1}^B, where d = delta + x * was.

    was [B] are the weights if kept, delta = now - was; x_i = 1 sets weight i to 0, so the change of the weights is -d.
    gradients [n, B]. No entry is dropped: negative couplings and diagonals are what a gain is made of.
    """
    mean, fisher = gradients.mean(0), gradients.mT @ gradients / len(gradients)
    bent = fisher @ delta
    diagonal = was * (bent - slope * mean + ridge * (2 * delta + was))
    constant = delta @ bent / 2 - slope * (mean @ delta) + ridge * (delta @ delta)
    return torch.outer(was, was) * fisher / 2 + diagonal.diag(), constant


def expected(gradients: Tensor, change: Tensor) -> float:
    """L(w + change) - L(w) to second order, change [B]."""
    along = gradients @ change
    return float(along.mean() + along.square().mean() / 2)
