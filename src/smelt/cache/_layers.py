"""What all cache layers share: rows that grow in storage made ahead, batch operations over every tensor, eviction.

`DynamicLayer` grows by `torch.cat`, a copy of the whole cache for every token. Here the storage has room for up to
1/8 more tokens than it holds, so appending n tokens copies each about eight times in all, whatever n.
The bytes held are a function of the number of tokens alone: crops and evictions give memory back at once.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from smelt.cache import KVCache
from smelt.model._walk import parts
from smelt.spec import SmeltError

__all__ = ["Attending", "Evicting", "GrowingLayer", "Grown", "Held", "Run", "capacity"]


def capacity(rows: int) -> int:
    """Rows of storage made for `rows` rows: rounded up to an eighth of the power of two below, at most 1/8 more."""
    step = max(1, (1 << rows.bit_length() >> 1) // 8)
    return -(-rows // step) * step


class Grown:
    """One tensor [b, h, n, ...] that grows along n. `rows` is what it holds, a view of `store`."""

    def __init__(self) -> None:
        self.store: Tensor | None = None
        self.count = 0

    def __len__(self) -> int:
        return self.count

    @property
    def rows(self) -> Tensor:
        assert self.store is not None, "asked for rows before the first append"
        return self.store[:, :, : self.count]

    def append(self, new: Tensor) -> None:
        if self.store is None:
            self.store = new.new_empty((*new.shape[:2], 0, *new.shape[3:]))
        total = self.count + new.shape[2]
        if new.requires_grad or self.store.requires_grad:  # autograd keeps earlier rows: never write beside them
            self.store = torch.cat([self.rows, new], 2)
        else:
            frozen = self.store.is_inference() and not torch.is_inference_mode_enabled()
            if total > self.store.shape[2] or frozen:
                self._move(self.rows, total)
            self.store[:, :, self.count : total] = new
        self.count = total

    def slice(self, start: int, stop: int) -> None:
        """Keep rows start..stop. Views handed out before stay as they were."""
        if start == 0 and self.store is not None and capacity(stop) == self.store.shape[2]:
            self.count = stop
        elif (start, stop) != (0, self.count):
            self._move(self.rows[:, :, start:stop], stop - start)

    def gather(self, index: Tensor) -> None:
        """Keep the rows `index` [b, h, m], in that order. Copies whole rows; `Tensor.gather` is ten times slower here."""
        assert self.store is not None, "asked for rows before the first append"
        b, h, room = self.store.shape[:3]
        first = room * torch.arange(b * h, device=index.device).view(b, h, 1)
        kept = self.store.flatten(0, 2).index_select(0, (first + index).flatten()).unflatten(0, (b, h, -1))
        if capacity(kept.shape[2]) == kept.shape[2]:
            self.store, self.count = kept, kept.shape[2]
        else:
            self._move(kept, kept.shape[2])

    def batch(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.store is not None:
            self.store = change(self.store)

    def _move(self, rows: Tensor, total: int) -> None:
        """Into storage of the size that `total` rows have, so that bytes depend on the count alone."""
        self.count = rows.shape[2]
        self.store = rows.new_empty((*rows.shape[:2], capacity(total), *rows.shape[3:]))
        self.store[:, :, : self.count] = rows


class Held(CacheLayerMixin):
    """A layer whose tensors are all `Grown` attributes: batch operations and `reset` reach them without a list to keep."""

    is_sliding = False
    record_past = False  # set under assisted decoding: compress at the next crop, when it is known what stays

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0
        self.key_rows, self.value_rows = Grown(), Grown()  # in the model's precision, newest last

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.key_rows.append(key_states[:, :, :0])
        self.value_rows.append(value_states[:, :, :0])
        self.is_initialized = True
        self.show()

    def append(self, key: Tensor, value: Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        self.key_rows.append(key)
        self.value_rows.append(value)
        self.seen += key.shape[2]

    def show(self) -> None:
        """`keys` and `values` as others expect them on a layer: views, no copies."""
        self.keys, self.values = (self.key_rows.rows, self.value_rows.rows) if self.is_initialized else (None, None)

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def activate_past_recording(self) -> None:
        self.record_past = True

    def reset(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, Grown):
                setattr(self, name, Grown())
        self.seen, self.is_initialized, self.record_past = 0, False, False
        self.show()

    def _batch(self, change: Callable[[Tensor], Tensor]) -> None:
        for value in vars(self).values():
            if isinstance(value, Grown):
                value.batch(change)
        self.show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._batch(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._batch(lambda rows: rows[indices])

    @abstractmethod
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens as if they had never been seen, or raise SmeltError."""


class Run(Protocol):
    """Attention over rows as the model would do it: grouped heads, its scaling, the attention method that is bound."""

    scaling: float  # what the model multiplies q . k by

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, /) -> Tensor:
        """[b, hq, t, d], [b, h, s, d] twice -> [b, t, hq, d]. `mask` is the one sdpa takes."""


class Attending(Held):
    """A layer that does the attention over itself. `update` takes the new tokens in and hands the layer over where keys and
    values are expected; transformers passes it on untouched, and the runtime's attention function calls `attend`.

    `attend(query, mask, run)`: query [b, hq, t, d] of the tokens just taken in -> output [b, t, hq, d]. `mask` is the one sdpa
    takes, made for `get_mask_sizes` before these tokens, None where plain causality or one token needs none.
    With nothing left out, `run(query, all keys, all values, mask)` is exact.
    What is dropped because of these queries is dropped at the end of `attend`; a method must not rely on a second call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peers: list[Any] = [self]  # all layers of the cache, in order

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.append(key_states, value_states)
        self.show()
        return self, self

    @abstractmethod
    def attend(self, query: Tensor, mask: Tensor | None, run: Run) -> Tensor: ...


class GrowingLayer(Held):
    """Every token in full precision, or those that `survivors` leaves after each update.

    The new tokens see what was kept before them and each other; then the survivors of all are chosen. A prompt
    given at once is therefore attended in full.
    """

    def __init__(self, survivors: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.survivors = survivors
        self.is_croppable = survivors is None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.append(key_states, value_states)
        key, value = self.key_rows.rows, self.value_rows.rows
        if self.survivors is not None:
            index = self.survivors(key, value)
            if index.shape[2] < key.shape[2]:
                self.key_rows.gather(index)
                self.value_rows.gather(index)
        self.show()
        return key, value

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.key_rows) + query_length, self.seen - len(self.key_rows)

    def crop(self, tokens_to_remove: int) -> None:
        if not tokens_to_remove:
            return
        left = self.seen - abs(tokens_to_remove)
        if not self.is_croppable or left < 0:
            raise SmeltError("this cache has dropped tokens and cannot go back; assisted decoding needs a cache that keeps them")
        self.key_rows.slice(0, left)
        self.value_rows.slice(0, left)
        self.seen = left
        self.show()


class Evicting(KVCache):
    """A method that drops tokens: it says which rows survive and how many they are, the layers do the rest."""

    evicts: ClassVar[bool] = True
    croppable: ClassVar[bool] = False

    @abstractmethod
    def survivors(self, key: Tensor, value: Tensor) -> Tensor:
        """[b, h, n, d], the rows kept so far and the new ones -> indices [b, h, m] of those that stay, in order."""

    @abstractmethod
    def kept(self, tokens: int) -> int:
        """Rows of one head and layer after `tokens` tokens, one by one or as one prompt."""

    def layer(self, config: Any, index: int) -> GrowingLayer:
        return GrowingLayer(self.survivors)

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        sizes = parts(config)
        return 2 * sizes.layers * batch * sizes.kv_heads * capacity(self.kept(prompt + written)) * sizes.head_dim * itemsize
