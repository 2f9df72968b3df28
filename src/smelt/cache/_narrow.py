"""Methods that make the rows of old tokens narrower, and the layer that attends over narrow old rows and full new ones.

`Narrowing.narrow(config, index)` gives a layer's `Narrow`: how rows get narrower, and how scores and outputs come from
narrow rows. It holds settings and tables, no rows. Who stores the rows is another matter: the method itself, as they
are, or a method that holds it (`kivi(inner=...)`), as codes. When tokens become old is said by the one who stores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from smelt.cache import KVCache
from smelt.cache._codes import Codes
from smelt.cache._layers import Attending, Grown, Run, capacity
from smelt.model._walk import parts
from smelt.spec import SmeltError

__all__ = ["Coding", "Narrow", "NarrowLayer", "Narrowing", "narrow_bytes"]

BUDGET = 1 << 24  # scores made at a time


class Narrow(ABC):
    """Rows of one layer, narrow. b rows of the batch, h key/value heads, d the head size, m queries of a group."""

    key_width: int
    value_width: int
    observed: int = 0  # last queries of the first call that `choose` wants to see; 0: nothing is chosen

    @abstractmethod
    def to(self, device: torch.device) -> None:
        """Tables to where the rows are."""

    @abstractmethod
    def table_bytes(self) -> int: ...

    @abstractmethod
    def choose(self, asked: Tensor, key: Tensor) -> Tensor:
        """Squared queries [b, h, observed, d], averaged over a group, and all keys [b, h, n, d] -> the choice [b, h, 1, key_width]."""

    @abstractmethod
    def keys(self, key: Tensor, start: int, chosen: Tensor | None) -> Tensor:
        """Rotated keys [b, h, n, d] of the tokens from position `start` on -> [b, h, n, key_width]."""

    @abstractmethod
    def values(self, value: Tensor) -> Tensor:
        """[b, h, n, d] -> [b, h, n, value_width]"""

    @abstractmethod
    def scores(self, query: Tensor, rows: Tensor, chosen: Tensor | None) -> Tensor:
        """Queries [b, h, m, d] and the narrow keys of tokens 0 to n - 1 -> [b, h, m, n]"""

    @abstractmethod
    def mixed(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Weights [b, h, m, n] and narrow values -> [b, h, m, d]"""


class Narrowing(KVCache):
    attends: ClassVar[bool] = True
    padded: ClassVar[bool] = False

    @abstractmethod
    def narrow(self, config: Any, index: int) -> Narrow:
        """Of layer `index`. Raises SmeltError where the shapes do not fit."""


class Coding(NamedTuple):
    """How another method stores narrow rows as codes: groups of `group` keys of a channel, and of at most as many channels of a value."""

    bits: int
    group: int

    def value_group(self, width: int) -> int:
        """The largest divisor of the width that fits and fills bytes."""
        fits = [size for size in range(4, min(self.group, width) + 1, 4) if width % size == 0]
        if not fits:
            raise SmeltError(f"kivi: values of {width} channels cannot be cut into groups of a multiple of 4")
        return fits[-1]


class NarrowLayer(Attending):
    """`key_rows` and `value_rows` are the new tokens in full; what is old lies narrow in `old_keys` and `old_values`.

    `split(n)` says how many keys and values are old after n tokens. Tokens are attended in full before they become old,
    a prompt given at once therefore as the model would do it. Later calls make the softmax here, over both kinds of rows.
    """

    is_croppable = True

    def __init__(self, narrow: Narrow, split: Callable[[int], tuple[int, int]], coding: Coding | None = None) -> None:
        super().__init__()
        self.narrow, self.split, self.coding = narrow, split, coding
        self.old_keys, self.key_scale, self.key_low = Grown(), Grown(), Grown()  # the last two with a coding only
        self.old_values, self.value_scale, self.value_low = Grown(), Grown(), Grown()
        self.asked, self.chosen = Grown(), Grown()  # squared queries until the choice is made; the choice
        self.first = 0  # tokens of the first call

    def attend(self, query: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        key, value = self.key_rows.rows, self.value_rows.rows
        if self.seen == query.shape[2]:
            self.narrow.to(key.device)
            self.first, self.asked = self.seen, Grown()
            if self.narrow.observed:
                last = query if self.record_past else query[:, :, -self.narrow.observed :]
                self.asked.append(last.detach().float().unflatten(1, (key.shape[1], -1)).square().mean(2))
        out = self._over_both(query, mask, run.scaling) if max(self._old()) else run(query, key, value, mask)
        if not self.record_past:
            self._narrow()
        self.show()
        return out

    def _over_both(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        new_key, new_value = self.key_rows.rows, self.value_rows.rows
        b, h, t, d = query.shape[0], new_key.shape[1], query.shape[2], query.shape[3]
        keys, values = self._old()
        old_key = self._read(self._keys(), keys, self.narrow.key_width) if keys else None
        old_value = self._read(self._values(), values, self.narrow.value_width) if values else None
        step = max(1, BUDGET // (b * query.shape[1] * self.seen))
        outs = []
        for start in range(0, t, step):
            q = scaling * query[:, :, start : start + step]
            size = q.shape[2]
            q = q.reshape(b, h, -1, d)  # [b, h, group * size, d]
            scores = q @ new_key.transpose(2, 3)
            if old_key is not None:
                scores = torch.cat([self.narrow.scores(q, old_key, self._chosen()).to(scores.dtype), scores], -1)
            if mask is not None:
                part = mask[:, :, None, start : start + size]  # [b, 1, 1, size, n]
                scores = scores.unflatten(2, (-1, size))
                scores = scores.masked_fill(~part, -math.inf) if part.dtype == torch.bool else scores + part
                scores = scores.flatten(2, 3)
            weights = scores.float().softmax(-1).to(query.dtype)
            out = weights[..., values:] @ new_value
            if old_value is not None:
                out = out + self.narrow.mixed(weights[..., :values], old_value).to(out.dtype)
            outs.append(out.view(b, query.shape[1], size, d).transpose(1, 2))
        return torch.cat(outs, 1) if len(outs) > 1 else outs[0]

    def _old(self) -> tuple[int, int]:
        return self.seen - len(self.key_rows), self.seen - len(self.value_rows)

    def _chosen(self) -> Tensor | None:
        return self.chosen.rows if len(self.chosen) else None

    def _keys(self) -> Grown | Codes:
        coding = self.coding
        return self.old_keys if coding is None else Codes(self.old_keys, self.key_scale, self.key_low, 2, coding.group, coding.bits)

    def _values(self) -> Grown | Codes:
        coding = self.coding
        if coding is None:
            return self.old_values
        group = coding.value_group(self.narrow.value_width)
        return Codes(self.old_values, self.value_scale, self.value_low, 3, group, coding.bits)

    def _read(self, held: Grown | Codes, count: int, width: int) -> Tensor:
        if isinstance(held, Grown):
            return held.rows
        out = self.key_rows.rows.new_empty((*self.key_rows.rows.shape[:2], count, width))
        held.read(out)
        return out

    def _narrow(self) -> None:
        """What has become old leaves the full rows."""
        (nk, nv), (keys, values) = self.split(self.seen), self._old()
        if nk > keys:
            full = self.key_rows.rows
            if self.narrow.observed and not len(self.chosen):
                self.chosen.append(self.narrow.choose(self.asked.rows[:, :, -self.narrow.observed :], full))
                self.asked = Grown()
            self._keys().append(self.narrow.keys(full[:, :, : nk - keys], keys, self._chosen()))
            self.key_rows.slice(nk - keys, len(self.key_rows))
        if nv > values:
            self._values().append(self.narrow.values(self.value_rows.rows[:, :, : nv - values]))
            self.value_rows.slice(nv - values, len(self.value_rows))
        if len(self.asked) > self.narrow.observed:
            self.asked.slice(len(self.asked) - self.narrow.observed, len(self.asked))

    def crop(self, tokens_to_remove: int) -> None:
        if not self.is_initialized and not tokens_to_remove:
            return
        left = self.seen - abs(tokens_to_remove)
        (nk, nv), (keys, values) = self.split(max(0, left)), self._old()
        unasked = self.narrow.observed and left < self.first and (len(self.chosen) > 0 or len(self.asked) < self.first)
        if left < 0 or min(keys, left) > nk or min(values, left) > nv or (left < self.seen and unasked):
            raise SmeltError(
                f"the last {-tokens_to_remove} of {self.seen} tokens cannot be taken back, they or those before them are no longer held "
                "in full; call activate_past_recording() on the cache before tokens that may be taken back"
            )
        for held, rows, old in ((self._keys(), self.key_rows, keys), (self._values(), self.value_rows, values)):
            rows.slice(0, max(0, left - old))
            if left < old:
                held.slice(0, left) if isinstance(held, Grown) else held.cut(left)
        if len(self.asked) and left < self.first:
            self.asked.slice(0, left)
            self.first = left
        self.seen = left
        if left:
            self._narrow()
        self.show()


def narrow_bytes(
    method: Narrowing,
    config: Any,
    prompt: int,
    tokens: int,
    split: tuple[int, int],
    itemsize: int,
    batch: int,
    coding: Coding | None = None,
) -> int:
    """Bytes of all layers, where `split` keys and values are old after `tokens` tokens, `prompt` of them in the first call."""
    sizes, (nk, nv), total = parts(config), split, 0
    d = sizes.head_dim
    for index in range(sizes.layers):
        narrow = method.narrow(config, index)
        if coding is None:
            old = (capacity(nk) * narrow.key_width + capacity(nv) * narrow.value_width) * itemsize
        else:
            old = Codes.bytes_of(nk, narrow.key_width, 2, coding.group, coding.bits)
            old += Codes.bytes_of(nv, narrow.value_width, 3, coding.value_group(narrow.value_width), coding.bits)
        new = (capacity(tokens - nk) + capacity(tokens - nv)) * d * itemsize
        asked = 2 * narrow.key_width if nk else 4 * d * capacity(min(prompt, narrow.observed))
        total += batch * sizes.kv_heads * (old + new + (asked if narrow.observed else 0)) + narrow.table_bytes()
    return total
