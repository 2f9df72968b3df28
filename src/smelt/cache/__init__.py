"""Key/value caches that hold fewer bytes. A method is a setting that builds transformers cache layers.

`layer(config, index)` returns a fresh `CacheLayerMixin` for layer `index`. The contract of transformers 5.23, kept
by `_layers.py` for all methods: `update(k, v)` appends and returns what attention sees now, the new tokens
included, k and v `[b, kv_heads, t, head_dim]` already rotated; `get_seq_length()` counts tokens *seen*;
`get_mask_sizes(q)` is `(kept + q, seen - kept)`; `crop(-n)` forgets the last n or raises; `reorder_cache` and the
other batch operations touch every tensor held.

A method that drops tokens whatever is asked derives from `_layers.Evicting` and says which ones survive. One that looks
at the queries, or never rebuilds what it keeps, has `_layers.Attending` layers, which do the attention over themselves.
`_calibrated.Calibrated`: what is measured on text beforehand is kept in `cache.safetensors`, which `weights` names.
State lives in the layers, never in the method. `smelt.runtime.new_cache(model, method)` puts the layers together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from transformers.cache_utils import CacheLayerMixin

__all__ = ["KVCache"]


class KVCache(ABC):
    evicts: ClassVar[bool] = False  # drops tokens: padded rows are refused by the runtime
    padded: ClassVar[bool] = True  # a row padded on its left comes out as if it were alone; else refused as well
    croppable: ClassVar[bool] = True  # may be used under assisted decoding
    equal_lengths: ClassVar[bool] = True  # all layers keep the same number of tokens
    keeps_all: ClassVar[bool] = False  # holds every token in full: saves reading, not bytes
    looks_ahead: ClassVar[bool] = False  # what a token reads depends on later tokens of its call
    rounds_ahead: ClassVar[bool] = False  # later tokens of a call change the order of float sums before them, nothing else
    attends: ClassVar[bool] = False  # its layers are `_layers.Attending`

    @classmethod
    @abstractmethod
    def unlimited(cls) -> Self:
        """The setting that drops and rounds nothing: it must equal the full cache, which the laws check."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """An instance for the family's laws, strong enough to be at work within 64 tokens and with heads of 32."""

    @abstractmethod
    def layer(self, config: Any, index: int) -> CacheLayerMixin:
        """A fresh layer. `config` is the text configuration; raises SmeltError when its shapes do not fit."""

    @abstractmethod
    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        """The accounting formula: bytes of all layers after a prompt of `prompt` tokens in one call and `written` more one by one."""
