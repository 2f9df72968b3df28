"""Counting the forward calls of a model while something runs: what tokens per call is divided by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

__all__ = ["Count", "count"]


@dataclass
class Count:
    """`calls` forward calls since the count began; `positions` of tokens put through them (rows x length)."""

    calls: int = 0
    positions: int = 0

    def tokens_per_call(self, new_tokens: int) -> float:
        return new_tokens / max(1, self.calls)


@contextmanager
def count(model: Any) -> Iterator[Count]:
    """Count calls of `model` itself; a draft is another model and is not counted. The hook is gone on exit."""
    seen = Count()

    def before(_: Any, args: tuple, kwargs: dict) -> None:
        read = kwargs.get("input_ids", args[0] if args else None)
        read = kwargs.get("inputs_embeds") if read is None else read
        seen.calls += 1
        seen.positions += read.shape[0] * read.shape[1] if read is not None else 0

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()
