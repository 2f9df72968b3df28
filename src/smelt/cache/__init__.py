"""Key/value caches that hold fewer bytes. A method is a setting that builds transformers cache layers.

`layer(config, index)` returns a fresh `CacheLayerMixin` for layer `index`. The contract of transformers 5.23, kept
by `_layers.py` for all methods: `update(k, v)` appends and returns what attention sees now, the new tokens
included, k and v `[b, kv_heads, t, head_dim]` already rotated; `get_seq_length()` counts tokens *seen*;
`get_mask_sizes(q)` is `(kept + q, seen - kept)`; `crop(-n)` forgets the last n or raises; `reorder_cache` and the
other batch operations touch every tensor held.

State lives in the layers, never in the method. `smelt.runtime.new_cache(model, method)` puts the layers together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from transformers.cache_utils import CacheLayerMixin

__all__ = ["KVCache"]


class KVCache(ABC):
    evicts: ClassVar[bool] = False  # drops tokens: left-padded rows are refused by the runtime
    croppable: ClassVar[bool] = True  # may be used under assisted decoding
    equal_lengths: ClassVar[bool] = True  # all layers keep the same number of tokens

    @abstractmethod
    def layer(self, config: Any, index: int) -> CacheLayerMixin: ...

    @abstractmethod
    def bytes_held(self, config: Any, tokens: int, itemsize: int = 4, batch: int = 1) -> int:
        """The accounting formula: bytes of all layers after `tokens` tokens, one by one or as one prompt."""
