"""An order of n passages is a permutation of range(n), best first; whatever else a judge returns is refused."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from smelt.rank import Judge
from smelt.spec import SmeltError

__all__ = ["ask"]


def ask(judge: Judge, query: str, passages: list[str], model: Any) -> list[int]:
    """The judge's order of these passages. Raises SmeltError when it is no permutation of range(len(passages))."""
    said = judge(query, passages, model)
    try:
        order = [index(i) for i in said] if isinstance(said, Sequence) else None
    except TypeError:
        order = None
    if order is None or sorted(order) != list(range(len(passages))):
        shown = repr(said) if len(repr(said)) <= 80 else repr(said)[:77] + "..."
        raise SmeltError(f"{type(judge).__name__} returned {shown}, which is not an order of {len(passages)} passages")
    return order
