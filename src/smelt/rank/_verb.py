"""`smelt.rank(model, query, passages)` is the verb, `smelt.ranking.rank`; `smelt.rank` stays the family's module."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

__all__ = ["callable_module"]


class _Verb(ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        return importlib.import_module("smelt.ranking").rank(*args, **options)


def callable_module(name: str) -> None:
    sys.modules[name].__class__ = _Verb
