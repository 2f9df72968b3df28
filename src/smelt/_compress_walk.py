"""The walk of a calibration pass: each block with what reaches its linear maps, behind the blocks as they are by then.

Every block is run twice over the calibration rows: once to measure what reaches its maps, once as the caller left it,
to make the input of the next. Padding is never counted. Memory besides the model: the hidden states of all rows
(rows * context * hidden values) and the statistics of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from smelt.model._walk import blocks, linears, stack
from smelt.spec import SmeltError

__all__ = ["SAMPLE", "Batch", "Sums", "Todo", "calibrated", "plain"]

Batch = Mapping[str, Tensor]
SAMPLE = 4096  # tokens whose inputs are kept as they are, spread evenly over the rows


@dataclass
class Sums:
    """What is added up over the tokens that reach one or more linear maps."""

    needs: tuple[str, ...]
    tokens: int = 0
    square: Tensor | float = 0.0
    absolute: Tensor | float = 0.0
    outer: Tensor | float = 0.0
    every: int = 1  # one token in so many is kept whole
    kept: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:  # [n, in]
        if "inputs" in self.needs:
            self.kept.append(x[-self.tokens % self.every :: self.every].clone())
        self.tokens += len(x)
        if "hessian" in self.needs:  # a product per batch in the precision of the model, their sum in float64: half the time of float64
            wide = x if x.dtype == torch.float64 else x.float()
            made = wide.mT @ wide
            if isinstance(self.outer, Tensor):
                self.outer += made
            else:
                self.outer = made.double()
        if not {"input_rms", "input_mean_abs"} & set(self.needs):
            return
        x = x.double()
        if "input_rms" in self.needs:
            self.square = self.square + x.square().sum(0)
        if "input_mean_abs" in self.needs:
            self.absolute = self.absolute + x.abs().sum(0)

    def values(self, names: Sequence[str], dtype: torch.dtype, scale: Tensor | float = 1.0) -> list[Any]:
        """The statistics of the input divided by `scale` [in]."""
        both = torch.outer(scale, scale) if isinstance(scale, Tensor) else scale
        makers: dict[str, Callable[[], Any]] = {
            "input_rms": lambda: ((self.square / self.tokens).sqrt() / scale).to(dtype),  # type: ignore[union-attr]
            "input_mean_abs": lambda: (self.absolute / self.tokens / scale).to(dtype),  # type: ignore[union-attr]
            "hessian": lambda: (self.outer / self.tokens).div_(both),  # type: ignore[union-attr]
            "tokens": lambda: self.tokens,
            "inputs": lambda: torch.cat(self.kept).to(dtype) / scale,
        }
        return [makers[name]() for name in names]


Todo = list[tuple[str, nn.Linear, Sums | None]]


def plain(model: Any) -> Iterator[Todo]:
    """The linear maps of each block in turn, with nothing measured."""
    listed = list(linears(model))
    for index in range(len(blocks(model))):
        yield [(name, module, None) for at, name, module in listed if at == index]


def calibrated(model: Any, batches: Sequence[Batch], needs: tuple[str, ...], where: str, done: int = 0) -> Iterator[Todo]:
    """The same with statistics. The caller compresses a block's maps before it asks for the next block.

    Nothing is measured in the first `done` blocks, which are compressed already and come with no maps.
    """
    if not batches or not any(int(batch["attention_mask"].sum()) for batch in batches):
        raise SmeltError(f"{where} measures its inputs first; it needs calibration rows")
    hidden, keeps, calls = _entrances(model, batches)
    every = max(1, -(-sum(int(keep.sum()) for keep in keeps) // SAMPLE))
    for index, todo in enumerate(plain(model)):
        block = blocks(model)[index]
        if index < done:
            yield []
        else:
            sums = _measure(block, [module for _, module, _ in todo], needs, every, hidden, keeps, calls, index)
            unused = [name for name, module, _ in todo if module not in sums]
            if unused:
                raise SmeltError(f"{where}: '{unused[0]}' was never called in calibration, so its inputs are unknown")
            yield [(name, module, sums[module]) for name, module, _ in todo]
        if index + 1 < len(blocks(model)):
            for at, state in enumerate(hidden):
                positional, named = calls[at][index]
                hidden[at] = block(state, *positional, **named)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _entrances(model: Any, batches: Sequence[Batch]) -> tuple[list[Tensor], list[Tensor], list[list[Call]]]:
    """Per batch: what enters the first block, which positions count, and what each block is called with besides.

    Masks and rotary tables differ by layer in some models, so one forward with all blocks replaced by the identity
    records the call of every block (references to a few shared tensors, not copies).
    """
    device = next(model.parameters()).device
    hidden: list[Tensor] = []
    keeps: list[Tensor] = []
    calls: list[list[Call]] = []

    def recorder(index: int) -> Callable[..., Tensor]:
        def forward(state: Tensor, *positional: Any, **named: Any) -> Tensor:
            if index == 0:
                hidden.append(state)
            calls[-1].append((positional, named))
            return state

        return forward

    listed = blocks(model)
    for index, block in enumerate(listed):
        block.forward = recorder(index)
    try:
        for batch in batches:
            calls.append([])
            mask = batch["attention_mask"].to(device)
            keeps.append(mask.bool())
            stack_of = model.base_model if stack(model) is not model else model
            stack_of(input_ids=batch["input_ids"].to(device), attention_mask=mask, use_cache=False)
    finally:
        for block in listed:
            del block.forward
    return hidden, keeps, calls


def _measure(
    block: nn.Module,
    modules: Sequence[nn.Linear],
    needs: tuple[str, ...],
    every: int,
    hidden: Sequence[Tensor],
    keeps: Sequence[Tensor],
    calls: Sequence[Sequence[Call]],
    index: int,
) -> dict[nn.Linear, Sums]:
    """Run one block over all rows. Maps that read the same tensor (query, key, value) share one set of sums."""
    sums: dict[nn.Linear, Sums] = {}
    seen: list[tuple[Tensor, Sums]] = []  # inputs of this forward; holding them keeps their identity
    counted: list[Tensor] = []  # which tokens of this forward are no padding

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        for x, owner in seen:
            if x is inputs[0] and sums.setdefault(module, owner) is owner:
                return
        own = sums.get(module)
        if own is None:
            own = sums[module] = Sums(needs, every=every)
        seen.append((inputs[0], own))
        own.add(inputs[0].reshape(-1, inputs[0].shape[-1])[counted[0]])

    handles = [module.register_forward_pre_hook(before) for module in modules]
    try:
        for state, keep, call in zip(hidden, keeps, calls, strict=True):
            seen.clear()
            counted[:] = [keep.reshape(-1)]
            positional, named = call[index]
            block(state, *positional, **named)
    finally:
        for handle in handles:
            handle.remove()
    return sums
