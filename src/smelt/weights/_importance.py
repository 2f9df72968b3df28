"""How much the parts of a decoder matter, measured by forward passes over calibration rows. Padding never counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from smelt.model._slice import head_input, norms
from smelt.model._walk import blocks, parts

__all__ = ["Energy", "Rows", "influence", "mean_loss", "removal_loss"]

Rows = Sequence[Mapping[str, Tensor]]


class Energy:
    """Mean squares over all calibration tokens, of one forward pass."""

    def __init__(self, model: Any, batches: Rows):
        self.sums: dict[Any, Tensor] = {}
        self.count, self.model, self.sizes = 0, model, parts(model.config)
        hooks: list[Any] = []
        for index, block in enumerate(blocks(model)):
            attention, mlp = head_input(block)
            hooks.append(attention.register_forward_hook(self._heads(index, attention)))
            hooks.append(mlp.register_forward_hook(self._hook(lambda inputs, output: inputs.square(), ("neurons", index))))
        for name, norm in norms(model):
            hooks.append(norm.register_forward_hook(self._hook(lambda inputs, output: output.square(), ("normed", name))))
        try:
            for batch in batches:
                mask = batch["attention_mask"].to(model.device)
                self.keep = mask.bool()
                self.count += int(mask.sum())
                model.base_model(input_ids=batch["input_ids"].to(model.device), attention_mask=mask, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def _hook(self, of: Callable[[Tensor, Tensor], Tensor], key: Any) -> Callable[..., None]:
        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            found = of(inputs[0].float(), output.float())[self.keep].double().sum(0)
            self.sums[key] = self.sums.get(key, 0) + found

        return after

    def _heads(self, index: int, attention: nn.Linear) -> Callable[..., None]:
        weight = attention.weight.float().unflatten(1, (self.sizes.heads, -1))  # [d, h, c]
        gram = torch.einsum("dhc,dhe->hce", weight, weight)  # |W a|^2 = a^T (W^T W) a, without [tokens, h, d]

        def lengths(inputs: Tensor, output: Tensor) -> Tensor:
            each = inputs.unflatten(-1, (self.sizes.heads, -1))
            return torch.einsum("bthc,hce,bthe->bth", each, gram, each)

        return self._hook(lengths, ("heads", index))

    def heads(self, layer: int) -> Tensor:
        return self.sums["heads", layer]

    def neurons(self, layer: int) -> Tensor:
        column = head_input(blocks(self.model)[layer])[1].weight.double().norm(dim=0)
        return self.sums["neurons", layer].sqrt() * column

    def channels(self) -> Tensor:
        return torch.stack([(v / self.count).sqrt() for k, v in self.sums.items() if k[0] == "normed"]).sum(0)


@contextmanager
def _without(model: Any, gone: Sequence[int]) -> Iterator[None]:
    """Run with some blocks replaced by the identity."""
    listed = [blocks(model)[at] for at in gone]
    for block in listed:
        block.forward = lambda state, *a, **k: state
    try:
        yield
    finally:
        for block in listed:
            del block.forward


def removal_loss(model: Any, batches: Rows, windows: Sequence[Sequence[int]]) -> list[float]:
    """Mean nats per token without each window of layers. Cost: one forward pass per window."""
    losses = []
    for window in windows:
        with _without(model, window):
            losses.append(mean_loss(model, batches))
    return losses


def mean_loss(model: Any, batches: Rows) -> float:
    total, count = 0.0, 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        keep = (mask[:, 1:] * mask[:, :-1]).bool()
        total += nn.functional.cross_entropy(logits[keep].float(), ids[:, 1:][keep], reduction="sum").item()
        count += int(keep.sum())
    return total / count


def influence(model: Any, batches: Rows, windows: Sequence[Sequence[int]]) -> list[float]:
    """1 - E cos(input of the window, output of the window), read at the blocks: the last hidden state is after the norm."""
    states: list[Tensor] = []
    hooks = [blocks(model)[0].register_forward_pre_hook(lambda m, inputs: states.append(inputs[0]))]
    hooks += [block.register_forward_hook(lambda m, inputs, output: states.append(output)) for block in blocks(model)]
    total, count = torch.zeros(len(windows), dtype=torch.double), 0
    try:
        for batch in batches:
            states.clear()
            mask = batch["attention_mask"].to(model.device)
            model.base_model(input_ids=batch["input_ids"].to(model.device), attention_mask=mask, use_cache=False)
            keep = mask.bool()
            for at, window in enumerate(windows):
                a, b = states[window[0]][keep], states[window[-1] + 1][keep]
                total[at] += (1 - nn.functional.cosine_similarity(a.float(), b.float(), dim=-1)).double().sum().cpu()
            count += int(keep.sum())
    finally:
        for hook in hooks:
            hook.remove()
    return (total / count).tolist()
