"""Judges order a few passages with one call of a model; strategies call a judge over many passages.

Judge: `(query, passages, model) -> order`, a permutation of range(len(passages)), best first. Strategy: the same
signature, holding a judge in its field `judge`; `calls(n)` is the number of judge calls it makes for n passages,
exactly, and `exact_top(n)` how many places at the top are certain to be right when the judge always sorts by one
fixed score. `model` is a `smelt.model._load.Loaded` (model, tokenizer, folder), or None for judges that need none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

__all__ = ["Judge", "Strategy"]


class Judge(ABC):
    comparable: ClassVar[bool] = False  # scores of different calls may be compared
    limit: ClassVar[int | None] = None  # passages one call can take, None when only the model's context bounds them

    @abstractmethod
    def __call__(self, query: str, passages: list[str], model: Any) -> list[int]: ...


class Strategy(ABC):
    @abstractmethod
    def __call__(self, query: str, passages: list[str], model: Any) -> list[int]: ...

    @abstractmethod
    def calls(self, n: int) -> int: ...

    @abstractmethod
    def exact_top(self, n: int) -> int: ...
