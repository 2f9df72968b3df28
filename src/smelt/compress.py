"""The one calibration pass: feeds methods of the `weights` family layer by layer, and saves what comes out.

Every block is run twice over the calibration rows: once to measure what reaches its linear maps, once compressed, to
make the input of the next block, so each layer is measured behind the already compressed layers before it. Padding is
never counted. Methods that measure nothing need no pass. Memory besides the model: the hidden states of all
calibration rows (rows * context * hidden values) and the statistics of one block.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt import registry
from smelt.data._tokens import Rows, Tokens
from smelt.model._load import save
from smelt.model._walk import blocks, fold, folds, linears, parts, stack
from smelt.progress import Track, track
from smelt.spec import SmeltError, nearest
from smelt.weights import STATISTICS, Codes, PerMatrix, Restructure, Scaled
from smelt.weights._formats import pack, packed_bytes, refuse_raw_codes

__all__ = ["Report", "calibration_rows", "compress", "save_compressed", "statistics_of"]

Batch = Mapping[str, Tensor]


class Report(dict):
    """What a compression did, ready for JSON. `codes` holds the packed matrices by module name, for `save_compressed`."""

    codes: dict[str, Codes]


def calibration_rows(tokens: Tokens, rows: int, context: int, batch: int, seed: int) -> list[dict[str, Tensor]]:
    """`rows` random windows of the train split in batches {input_ids [b, t], attention_mask [b, t]}. Same seed, same rows."""
    if rows < 1 or batch < 1:
        raise SmeltError(f"calibrate: rows={rows} and batch={batch} must be at least 1")
    packed = Rows(tokens, context, rows, seed)
    ids = [packed[i]["input_ids"] for i in range(rows)]
    stacked = [torch.stack(ids[i : i + batch]) for i in range(0, rows, batch)]
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in stacked]


def statistics_of(method: PerMatrix | Scaled) -> tuple[str, ...]:
    """The statistics a method asks for: the parameters of its call after the weight. Raises SmeltError for unknown ones."""
    names = tuple(inspect.signature(method).parameters)[1:]
    for name in names:
        if name not in STATISTICS:
            raise SmeltError(f"{type(method).__name__} asks for '{name}', which calibration does not measure{nearest(name, STATISTICS)}")
    return names


def compress(model: Any, tokenizer: Any, method: Any, rows: Iterable[Batch], *, progress: str | None = "compress") -> tuple[Any, Report]:
    """Apply a method of `weights` to a model. `progress` is the label of the bar, None shows none.

    `PerMatrix` and `Scaled` methods change the model in place, `Restructure` methods return another one. Raises SmeltError when
    nothing matched, when nothing changed, and when a result has another shape or values that are not finite.
    """
    registry.check(method)
    where = ": ".join(registry.name_of(method))
    if getattr(model.config, "quantization_config", None) is not None:
        raise SmeltError(f"{where}: the model is quantized already; compress the model it was made from")
    before = model.num_parameters()
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            if isinstance(method, Restructure):
                model, report = _restructure(model, method, rows, where)
            elif isinstance(method, (PerMatrix, Scaled)):
                report = _matrices(model, method, rows, where, progress)
            else:
                raise SmeltError(f"{where} is neither a PerMatrix nor a Scaled nor a Restructure method")
    finally:
        model.train(was_training)
    report.update(method=registry.text(method), parameters_before=before, parameters_after=model.num_parameters())
    return model, report


def save_compressed(model: Any, tokenizer: Any, folder: Path, report: Report, dtype: torch.dtype | None = None) -> None:
    """A checkpoint that plain transformers loads: dense, or packed when the method quantized. `dtype` is that of what stays dense.

    Loaded in the dtype the model has here, packed matrices are equal bit for bit to those measured.
    """
    save(model, tokenizer, folder, dtype)
    if report.codes:
        pack(folder, model, report.codes)
    else:
        refuse_raw_codes(folder)


# ---------------------------------------------------------------------- other shapes


def _restructure(model: Any, method: Restructure, rows: Iterable[Batch], where: str) -> tuple[Any, Report]:
    made = method(model, [dict(batch) for batch in rows])
    if _same(model, made):
        raise SmeltError(f"{where} changed nothing: the model has the shape asked for already")
    report = Report(kind="restructure", shape_before=parts(model.config)._asdict(), shape_after=parts(made.config)._asdict())
    report.codes = {}
    return made.eval(), report


def _same(a: nn.Module, b: nn.Module) -> bool:
    theirs = dict(b.named_parameters())
    return all(name in theirs and torch.equal(p, theirs[name]) for name, p in a.named_parameters())


# ---------------------------------------------------------------------- matrix by matrix


@dataclass
class _Sums:
    """What is added up over the tokens that reach one or more linear maps."""

    needs: tuple[str, ...]
    tokens: int = 0
    square: Tensor | float = 0.0
    absolute: Tensor | float = 0.0
    outer: Tensor | float = 0.0

    def add(self, x: Tensor) -> None:  # [n, in]
        x = x.double()
        self.tokens += len(x)
        if "input_rms" in self.needs:
            self.square = self.square + x.square().sum(0)
        if "input_mean_abs" in self.needs:
            self.absolute = self.absolute + x.abs().sum(0)
        if "hessian" in self.needs:
            self.outer = self.outer + x.mT @ x

    def values(self, names: Sequence[str], dtype: torch.dtype, scale: Tensor | float = 1.0) -> list[Any]:
        """The statistics of the input divided by `scale` [in]."""
        both = torch.outer(scale, scale) if isinstance(scale, Tensor) else scale
        makers: dict[str, Callable[[], Any]] = {
            "input_rms": lambda: ((self.square / self.tokens).sqrt() / scale).to(dtype),  # type: ignore[union-attr]
            "input_mean_abs": lambda: (self.absolute / self.tokens / scale).to(dtype),  # type: ignore[union-attr]
            "hessian": lambda: self.outer / self.tokens / both,
            "tokens": lambda: self.tokens,
        }
        return [makers[name]() for name in names]


def _matrices(model: Any, method: PerMatrix | Scaled, rows: Iterable[Batch], where: str, progress: str | None) -> Report:
    last: PerMatrix = method.quantizer if isinstance(method, Scaled) else method
    reads = statistics_of(last)
    needs = tuple(dict.fromkeys((*statistics_of(method), *reads)))
    listed = list(linears(model))
    if not listed:
        raise SmeltError(f"{where}: no linear map inside the blocks of {type(model).__name__}; nothing to compress")
    shapes = [(module.out_features, module.in_features) for _, _, module in listed]
    last.budget(shapes)  # refuses shapes that do not fit before any work
    found = {id(module.weight) for _, _, module in listed}
    missed = [name for name, p in blocks(model).named_parameters() if p.dim() > 1 and id(p) not in found]
    report = Report(kind="per_matrix", matched=len(listed), of=len(listed) + len(missed), missed=missed)
    report.codes = {}
    walk = _calibrated(model, list(rows), needs, where) if needs else _plain(model)
    weights = zeros = 0
    bits = change = norm = 0.0
    tokens = None
    bar = track(progress, len(blocks(model)), "layers") if progress else nullcontext(Track("", 0, "layers"))
    with bar as shown:
        for index, todo in enumerate(walk):
            scales = _scaled(blocks(model)[index], method, todo, where) if isinstance(method, Scaled) else {}
            for name, module, sums in todo:
                weight = module.weight.data
                result = last(weight, *(sums.values(reads, weight.dtype, scales.get(module, 1.0)) if sums else ()))
                dense = (result.dequantize() if isinstance(result, Codes) else result).to(weight.dtype)
                if dense.shape != weight.shape or not torch.isfinite(dense).all():
                    raise SmeltError(f"{where}: '{name}' came out with shape {tuple(dense.shape)} or values that are not finite")
                if isinstance(result, Codes):
                    report.codes[name] = result
                    bits += 8.0 * packed_bytes(result)
                else:
                    bits += 8.0 * dense.element_size() * dense.numel()
                change += (dense.double() - weight.double()).square().sum().item()
                norm += weight.double().square().sum().item()
                weights, zeros = weights + dense.numel(), zeros + int((dense == 0).sum())
                tokens = sums.tokens if sums else None
                module.weight.data = dense
            shown.advance(1)
    if change == 0.0 and not report.codes:
        raise SmeltError(f"{where} changed nothing: all {len(listed)} matrices are as they were")
    report.update(
        weights=weights,
        sparsity=zeros / weights,
        bits_per_weight=bits / weights,
        bytes=int(bits / 8),
        relative_change=(change / norm) ** 0.5 if norm else 0.0,
        calibration_tokens=tokens,
    )
    return report


Todo = list[tuple[str, nn.Linear, _Sums | None]]


def _scaled(block: nn.Module, method: Scaled, todo: Todo, where: str) -> dict[nn.Module, Tensor]:
    """Scale the maps of one block and what comes before them, function unchanged. Returns the scale of each map's input."""
    measured = {module: (name, sums) for name, module, sums in todo}
    scales: dict[nn.Module, Tensor] = {}
    for found in folds(block):
        weights = [module.weight.data for module in found.readers]
        name, sums = measured[found.readers[0]]
        if any(measured[module][1] is not sums for module in found.readers):
            raise SmeltError(f"{where}: '{name}' does not read the same input as the maps beside it, so they cannot be scaled together")
        scale = method(weights, *(sums.values(statistics_of(method), weights[0].dtype) if sums else ()))
        if scale.shape != weights[0].shape[1:] or not torch.isfinite(scale).all() or not (scale > 0).all():
            raise SmeltError(f"{where}: '{name}' came out with scales that are not {weights[0].shape[1]} positive numbers")
        fold(found, scale)
        scales.update(dict.fromkeys(found.readers, scale))
    return scales


def _plain(model: Any) -> Iterator[Todo]:
    """The linear maps of each block in turn, with nothing measured."""
    listed = list(linears(model))
    for index in range(len(blocks(model))):
        yield [(name, module, None) for at, name, module in listed if at == index]


def _calibrated(model: Any, batches: Sequence[Batch], needs: tuple[str, ...], where: str) -> Iterator[Todo]:
    """The same with statistics. The caller compresses a block's maps before it asks for the next block."""
    if not batches or not any(int(batch["attention_mask"].sum()) for batch in batches):
        raise SmeltError(f"{where} measures its inputs first; it needs calibration rows")
    hidden, keeps, calls = _entrances(model, batches)
    for index, todo in enumerate(_plain(model)):
        block = blocks(model)[index]
        sums = _measure(block, [module for _, module, _ in todo], needs, hidden, keeps, calls, index)
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
    hidden: Sequence[Tensor],
    keeps: Sequence[Tensor],
    calls: Sequence[Sequence[Call]],
    index: int,
) -> dict[nn.Linear, _Sums]:
    """Run one block over all rows. Maps that read the same tensor (query, key, value) share one set of sums."""
    sums: dict[nn.Linear, _Sums] = {}
    seen: list[tuple[Tensor, _Sums]] = []  # inputs of this forward; holding them keeps their identity
    counted: list[Tensor] = []  # which tokens of this forward are no padding

    def before(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.Linear)
        for x, owner in seen:
            if x is inputs[0] and sums.setdefault(module, owner) is owner:
                return
        own = sums.get(module)
        if own is None:
            own = sums[module] = _Sums(needs)
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
