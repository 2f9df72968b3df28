"""The contracts of methods that look at the model as a whole: another shape, a search over levels, masks moved between layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from smelt.weights import PerMatrix, Result

__all__ = ["Bench", "Restructure", "Whole"]


class Restructure(ABC):
    """(model, calibration rows) -> smaller model. `target(config)` is the configuration it leaves (no weights read)."""

    gentlest: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def __call__(self, model: Any, rows: Iterable[dict[str, Tensor]]) -> Any: ...

    @abstractmethod
    def target(self, config: Any) -> Any: ...


class Bench(Protocol):
    """What a `Whole` method is given. Linear maps go by their full names; nothing is measured behind compressed layers."""

    rows: list[Any]  # calibration batches {input_ids [b, t], attention_mask [b, t]}
    report: Any  # a dictionary; what the method has to say goes in here
    seed: int

    def results(self, methods: Sequence[PerMatrix]) -> dict[str, list[Result]]: ...  # of every map, one calibration pass for all
    def statistics(self, names: Sequence[str]) -> Iterable[tuple[str, nn.Linear, dict[str, Any]]]: ...
    def put(self, name: str, result: Result) -> None: ...  # once for each map that changes
    def journal(self, name: str) -> Any: ...  # a `Journal` that outlives a kill: the same call finds what it has put
    def track(self, label: str, total: int, unit: str) -> Any: ...  # a progress bar: `with ... as bar: bar.advance()`


class Whole(ABC):
    """(model, bench) -> model: the same one, its maps changed through `bench.put`, or another plain one. Called with
    gradients off. A killed run calls it again: what was searched so far must come from its journal, all else from `seed`."""

    gentlest: ClassVar[Mapping[str, Any]]

    @abstractmethod
    def __call__(self, model: Any, bench: Bench) -> Any: ...

    @classmethod
    @abstractmethod
    def example(cls) -> Any: ...  # a small instance for the family's laws
