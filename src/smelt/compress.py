"""The one calibration pass: feeds methods of the `weights` family layer by layer, and saves what comes out.

Each layer is measured behind the already compressed layers before it (`_compress_walk.py`). Methods that measure
nothing need no pass. With a `place` on disk every finished block is kept there, and a pass that was killed goes on
after the last one.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from smelt import registry
from smelt._compress_kept import keep_block, kept_blocks
from smelt._compress_walk import Batch, Todo, calibrated, plain
from smelt.data._tokens import Rows, Tokens
from smelt.journal import Journal
from smelt.model._load import save
from smelt.model._swap import SwappedLinear, put, swapped
from smelt.model._walk import blocks, fold, folds, linears, parts, prefix_of
from smelt.progress import Track, track
from smelt.spec import SmeltError, nearest
from smelt.weights import STATISTICS, Codes, PerMatrix, Result, Scaled
from smelt.weights._formats import pack, packed_bytes, refuse_raw_codes, uniform
from smelt.weights._whole import Restructure, Whole

__all__ = ["Report", "calibration_rows", "compress", "save_compressed", "statistics_of"]


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


def compress(
    model: Any,
    tokenizer: Any,
    method: Any,
    rows: Iterable[Batch],
    *,
    progress: str | None = "compress",
    place: Path | None = None,
    seed: int = 0,
) -> tuple[Any, Report]:
    """Apply a method of `weights` to a model. `progress` is the label of the bar, None shows none.

    `PerMatrix` and `Scaled` methods change the model in place, `Restructure` and `Whole` methods may return another one. `place`
    is a folder for what a kill must not lose; the same call with the same `place` goes on. Raises SmeltError when nothing
    matched, when nothing changed, and when a result has another shape or values that are not finite.
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
                report = _matrices(model, method, rows, where, progress, place)
            elif isinstance(method, Whole):
                model, report = _whole(model, method, rows, where, progress, place, seed)
            else:
                raise SmeltError(f"{where} is neither a PerMatrix nor a Scaled, Restructure or Whole method")
    finally:
        model.train(was_training)
    report.update(method=registry.text(method), parameters_before=before, parameters_after=model.num_parameters())
    return model, report


def save_compressed(model: Any, tokenizer: Any, folder: Path, report: Report, dtype: torch.dtype | None = None) -> None:
    """A checkpoint: dense, or packed when the method quantized. `dtype` is that of what stays dense.

    Loaded in the dtype the model has here, packed matrices are equal bit for bit to those measured. Matrices quantized
    in several ways, or beside modules of smelt's own, are stored dense, with the values measured: transformers reads one
    scheme for the whole model. report["stored"] says which it was.
    """
    save(model, tokenizer, folder, dtype)
    alone = not any(True for _ in swapped(model))
    if report.codes and alone and uniform(report.codes):
        pack(folder, model, report.codes)
        report["stored"] = "packed"
    else:
        refuse_raw_codes(folder)
        report["stored"] = "dense"
    report["loads_in"] = "transformers" if alone else "smelt"


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
class _Totals:
    """What was stored and what was changed, over all matrices so far."""

    weights: int = 0
    zeros: int = 0
    bits: float = 0.0
    change: float = 0.0
    norm: float = 0.0
    tokens: int | None = None

    def figures(self) -> dict[str, Any]:
        return {
            "weights": self.weights,
            "sparsity": self.zeros / self.weights,
            "bits_per_weight": self.bits / self.weights,
            "bytes": int(self.bits / 8),
            "relative_change": (self.change / self.norm) ** 0.5 if self.norm else 0.0,
            "calibration_tokens": self.tokens,
        }


def _install(model: Any, name: str, module: nn.Linear, result: Result, totals: _Totals, codes: dict[str, Codes], where: str) -> None:
    """Put a result in the place of a linear map, after a look at its shape and values."""
    weight = module.weight.data
    if isinstance(result, Codes):
        dense = result.dequantize().to(weight.dtype)
    elif isinstance(result, SwappedLinear):
        dense = result.dense().to(weight.dtype)
    else:
        dense = result.to(weight.dtype)
    if dense.shape != weight.shape or not torch.isfinite(dense).all():
        raise SmeltError(f"{where}: '{name}' came out with shape {tuple(dense.shape)} or values that are not finite")
    codes.pop(name, None)
    if isinstance(result, Codes):
        codes[name] = result
        totals.bits += 8.0 * packed_bytes(result)
    elif isinstance(result, SwappedLinear):
        totals.bits += 8.0 * sum(t.nbytes for t in (*result.parameters(), *result.buffers()))
    else:
        totals.bits += 8.0 * dense.element_size() * dense.numel()
    totals.change += (dense.double() - weight.double()).square().sum().item()
    totals.norm += weight.double().square().sum().item()
    totals.weights, totals.zeros = totals.weights + dense.numel(), totals.zeros + int((dense == 0).sum())
    if isinstance(result, SwappedLinear):
        result.bias = module.bias
        put(model, name, result.eval())
    else:
        module.weight.data = dense


def _listed(model: Any, where: str) -> tuple[list[tuple[int, str, nn.Linear]], Report]:
    """The linear maps, and the beginning of the report."""
    listed = list(linears(model))
    if not listed:
        raise SmeltError(f"{where}: no linear map inside the blocks of {type(model).__name__}; nothing to compress")
    found = {id(module.weight) for _, _, module in listed}
    missed = [name for name, p in blocks(model).named_parameters() if p.dim() > 1 and id(p) not in found]
    report = Report(kind="per_matrix", matched=len(listed), of=len(listed) + len(missed), missed=missed)
    report.codes = {}
    return listed, report


@contextmanager
def _bar(label: str | None, total: int, unit: str) -> Iterator[Track]:
    with track(label, total, unit) if label else nullcontext(Track("", 0, unit)) as shown:
        yield shown


def _matrices(
    model: Any, method: PerMatrix | Scaled, rows: Iterable[Batch], where: str, progress: str | None, place: Path | None
) -> Report:
    last: PerMatrix = method.quantizer if isinstance(method, Scaled) else method
    reads = statistics_of(last)
    needs = tuple(dict.fromkeys((*statistics_of(method), *reads)))
    listed, report = _listed(model, where)
    last.budget([(module.out_features, module.in_features) for _, _, module in listed])  # refuses shapes that do not fit before any work
    prefix, totals, done = prefix_of(model), _Totals(), 0
    if place is not None and needs:
        done, report.codes, about = kept_blocks(place, blocks(model), prefix)
        totals = _Totals(**about)
    walk = calibrated(model, list(rows), needs, where, done) if needs else plain(model)
    with _bar(progress, len(blocks(model)), "layers") as shown:
        for index, todo in enumerate(walk):
            if index >= done:
                block = blocks(model)[index]
                scales = _scaled(block, method, todo, where) if isinstance(method, Scaled) else {}
                for name, module, sums in todo:
                    given = sums.values(reads, module.weight.dtype, scales.get(module, 1.0)) if sums else ()
                    _install(model, name, module, last(module.weight.data, *given), totals, report.codes, where)
                    totals.tokens = sums.tokens if sums else None
                if place is not None and needs:
                    keep_block(place, index, block, f"{prefix}{index}.", report.codes, asdict(totals))
            shown.advance(1)
    if totals.change == 0.0 and not report.codes:
        raise SmeltError(f"{where} changed nothing: all {len(listed)} matrices are as they were")
    report.update(totals.figures())
    return report


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


# ---------------------------------------------------------------------- the model as a whole


class _Bench:
    """What a `Whole` method works with; the contract is `smelt.weights._whole.Bench`."""

    def __init__(self, model: Any, rows: list[Batch], where: str, progress: str | None, place: Path | None, seed: int):
        self.model, self.rows, self.where, self.progress, self.place, self.seed = model, rows, where, progress, place, seed
        self.listed, self.report = _listed(model, where)
        self.report["kind"] = "whole"
        self.totals = _Totals()
        self.installed: set[str] = set()

    def results(self, methods: Sequence[PerMatrix]) -> dict[str, list[Result]]:
        reads = [statistics_of(method) for method in methods]
        shapes = [(module.out_features, module.in_features) for _, _, module in self.listed]
        for method in methods:
            method.budget(shapes)
        found: dict[str, list[Result]] = {}
        for todo in self._walk(tuple(dict.fromkeys(name for names in reads for name in names))):
            for name, module, sums in todo:
                weight = module.weight.data
                found[name] = [
                    method(weight.clone(), *(sums.values(names, weight.dtype) if sums else ()))
                    for method, names in zip(methods, reads, strict=True)
                ]
        return found

    def statistics(self, names: Sequence[str]) -> Iterator[tuple[str, nn.Linear, dict[str, Any]]]:
        for todo in self._walk(tuple(names)):
            for name, module, sums in todo:
                yield name, module, dict(zip(names, sums.values(names, module.weight.dtype), strict=True)) if sums else {}

    def _walk(self, needs: tuple[str, ...]) -> Iterator[Todo]:
        walk = calibrated(self.model, self.rows, needs, self.where) if needs else plain(self.model)
        with self.track("calibrate", len(blocks(self.model)), "layers") as shown:
            for todo in walk:
                self.totals.tokens = next((sums.tokens for _, _, sums in todo if sums), None)
                yield todo
                shown.advance(1)

    def put(self, name: str, result: Result) -> None:
        if name in self.installed:
            raise SmeltError(f"{self.where}: '{name}' was put in its place already")
        module = next(module for _, known, module in self.listed if known == name)
        _install(self.model, name, module, result, self.totals, self.report.codes, self.where)
        self.installed.add(name)

    def journal(self, name: str) -> Journal | dict[str, Any]:
        return Journal(self.place / f"{name}.jsonl") if self.place else _Forgotten()

    def track(self, label: str, total: int, unit: str) -> Any:
        return _bar(f"{self.progress}: {label}" if self.progress else None, total, unit)


class _Forgotten(dict):
    """A journal of a call that has no folder."""

    def put(self, key: str, value: Any) -> None:
        self[key] = value


def _whole(
    model: Any, method: Whole, rows: Iterable[Batch], where: str, progress: str | None, place: Path | None, seed: int
) -> tuple[Any, Report]:
    bench = _Bench(model, list(rows), where, progress, place, seed)
    before = parts(model.config)
    made = method(model, bench)
    report, totals = bench.report, bench.totals
    for _, name, module in bench.listed:  # what the method left alone, and what it changed by itself
        if made is model and name not in bench.installed:
            totals.bits += 8.0 * module.weight.nbytes
            totals.norm += module.weight.double().square().sum().item()
            totals.weights, totals.zeros = totals.weights + module.weight.numel(), totals.zeros + int((module.weight == 0).sum())
    if made is model:
        if totals.change == 0.0 and not report.codes:
            raise SmeltError(f"{where} changed nothing: all {len(bench.listed)} matrices are as they were")
        report.update({**totals.figures(), **report})
    else:
        report.codes = {}
        report.update(shape_before=before._asdict(), shape_after=parts(made.config)._asdict())
    return made.eval(), report
