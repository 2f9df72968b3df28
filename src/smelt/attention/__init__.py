"""Attention functions, each together with its mask function: without one, transformers passes no mask and the future leaks.

A method is called as transformers calls an attention function:
`(module, query [b, h, t, d], key [b, g, s, d], value [b, g, s, d], attention_mask, scaling=, dropout=, **kw)`
and returns `(output [b, t, h, d], weights or None)`. Keys and values already hold the cache and are not repeated.
`mask` says which mask it wants: "float" an additive one, always given when anything is masked (transformers'
`eager_mask`), "bool" the one sdpa takes, None when plain causality suffices. The runtime registers one dispatcher
name per kind with both interfaces and sets the function on each layer, restoring both on exit.

`Attached` methods need more than a function (positions, a mask made from the ids): hooks, for the length of the bind.
`_mixer.Converting` methods put other modules in the place of attention and leave a checkpoint: they are stages, not bound.
`Pooling` is attention of a few learned queries over an encoder's states: a head, held by a method that makes vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

__all__ = ["Attached", "Attention", "Pooling"]


class Attention(ABC):
    mask: ClassVar[Literal["float", "bool"]] = "float"
    exact: ClassVar[bool] = False  # equals sdpa for every setting
    prompt_wide: ClassVar[bool] = False  # which keys are read is chosen from a whole prompt (never a later one); only calls with t = s

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


class Attached(ABC):
    @abstractmethod
    def attach(self, model: Any, tokenizer: Any) -> AbstractContextManager[Any]:
        """Hooks on `model`, on when entered and off again when left, the model then as it was, bit for bit. A model that was loaded
        with the method is never left."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self: ...


class Pooling(ABC):
    @abstractmethod
    def module(self, width: int) -> nn.Module:
        """New: (states [b, t, width], real [b, t] bool) -> vectors [b, out]."""
