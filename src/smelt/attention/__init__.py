"""Attention functions, each together with its mask function: without one, transformers passes no mask and the future leaks.

A method is called as transformers calls an attention function:
`(module, query [b, h, t, d], key [b, g, s, d], value [b, g, s, d], attention_mask, scaling=, dropout=, **kw)`
and returns `(output [b, t, h, d], weights or None)`. Keys and values already hold the cache and are not repeated.
`mask` says which mask it wants: "float" an additive one, always given when anything is masked (transformers'
`eager_mask`), "bool" the one sdpa takes, None when plain causality suffices. The runtime registers one dispatcher
name per kind with both interfaces and sets the function on each layer, restoring both on exit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

__all__ = ["Attention"]


class Attention(ABC):
    mask: ClassVar[Literal["float", "bool"]] = "float"
    exact: ClassVar[bool] = False  # equals sdpa for every setting

    @classmethod
    @abstractmethod
    def unlimited(cls) -> Self:
        """The setting that leaves nothing out: it must equal sdpa, which the laws check."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """An instance for the family's laws, strong enough to be at work within 64 tokens."""

    @abstractmethod
    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]: ...
