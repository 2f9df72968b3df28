"""KIVI: keys quantized per channel, values per token, the newest tokens left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from torch import Tensor

from smelt.cache import KVCache
from smelt.cache._codes import Codes
from smelt.cache._layers import Grown, Held, capacity
from smelt.cache._narrow import Coding, Narrowing, NarrowLayer, narrow_bytes
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["Kivi"]


@dataclass(frozen=True)
class Kivi(KVCache):
    """X = s code + m, m = min X, s = (max X - min X) / (2^bits - 1), code = round((X - m) / s), over groups of `group`.

    Keys share (s, m) over `group` consecutive tokens of one channel, values over `group` channels of one token.
    With R = `window` and n tokens seen, the first nk = n - n mod R keys and nv = max(0, n - R) values are codes, the
    rest keeps the model's precision; so keys are quantized R at a time, values one by one. New tokens are
    attended exactly before any of them is quantized, a prompt given at once therefore as a whole.

    update: [b, h, t, d] -> [b, h, n, d] twice. Codes are packed 8 / bits to a byte (keys along tokens, values along
    channels), s and m are fp16. Bytes per row and head (before at most 1/8 for room to grow):
    (nk + nv) d bits / 8 + 4 (nk + nv) d / group + (2 n - nk - nv) d itemsize, 3 bits per element at bits=2,
    group=32 for n >> R. FLOPs: those of the full cache and 4 n d per head and step to dequantize; it saves memory
    and, in plain torch, no time.

    The state depends only on the tokens seen, not on how they were cut into calls; what a token attends does: tokens
    that come in one call (a prompt, a block of assisted decoding) all see the state before the call. `crop` is
    exact or raises: behind the window it needs `activate_past_recording()` before the tokens that may go.
    Raises SmeltError: `window` no multiple of `group`, head_dim no multiple of `group`; padded rows (runtime),
    because padding would widen the range of the groups it falls into.

    `inner`, a method that makes old rows narrower (think, eigen): its narrow rows are what is stored as codes, the window
    stays in full and is this method's, `inner.window` is not used. Values of w channels have groups of the largest
    divisor of w that `group` allows. Such a cache attends over itself, where kivi alone shows keys and values to any attention.

    Differs from the paper: codes are rounded with the fp16 (s, m) that are stored, so that no error is added twice;
    (s, m) beyond the range of fp16 are clamped to it. No fused kernel.
    """

    paper: ClassVar = Paper("KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", "arXiv:2402.02750", "algorithm 1")
    padded: ClassVar[bool] = False
    bits: Literal[2, 4, 8] = 2
    group: Annotated[int, Ge(4)] = 32
    window: Annotated[int, Ge(4)] = 128  # tokens
    inner: Any = None  # a method that makes rows narrower

    def __post_init__(self) -> None:
        if self.group % 4:
            raise SmeltError(f"kivi: group={self.group} is not a multiple of 4, so its codes do not fill bytes")
        if self.window % self.group:
            raise SmeltError(f"kivi: window={self.window} is not a multiple of group={self.group}, so a full window has a broken group")
        if self.inner is not None and not isinstance(self.inner, Narrowing):
            raise SmeltError(f"kivi: inner={self.inner!r:.80} makes no rows narrower; think() and eigen() do")

    @property
    def attends(self) -> bool:  # type: ignore[override]
        return self.inner is not None

    @classmethod
    def unlimited(cls) -> Self:
        return cls(window=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(bits=2, group=8, window=16)

    def layer(self, config: Any, index: int) -> KiviLayer | NarrowLayer:
        if self.inner is not None:
            narrow, coding = self.inner.narrow(config, index), Coding(self.bits, self.group)
            coding.value_group(narrow.value_width)
            return NarrowLayer(narrow, self.split, coding)
        width = parts(config).head_dim
        if width % self.group:
            fit = max((g for g in range(4, width + 1, 4) if width % g == 0), default=0)
            hint = f"; group={fit} fits" if fit else ""
            raise SmeltError(f"kivi: group={self.group} does not divide the head size {width}{hint}")
        return KiviLayer(self)

    def split(self, tokens: int) -> tuple[int, int]:
        """(nk, nv): how many keys and values are codes after `tokens` tokens."""
        return tokens - tokens % self.window, max(0, tokens - self.window)

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        tokens = prompt + written
        sizes, (nk, nv) = parts(config), self.split(tokens)
        if self.inner is not None:
            return narrow_bytes(self.inner, config, prompt, tokens, (nk, nv), itemsize, batch, Coding(self.bits, self.group))
        d = sizes.head_dim
        old = Codes.bytes_of(nk, d, 2, self.group, self.bits) + Codes.bytes_of(nv, d, 3, self.group, self.bits)
        new = (capacity(tokens - nk) + capacity(tokens - nv)) * d * itemsize
        return sizes.layers * batch * sizes.kv_heads * (old + new)


class KiviLayer(Held):
    """`key_rows` and `value_rows` are the windows; what left them is in three tensors each."""

    is_croppable = True

    def __init__(self, method: Kivi) -> None:
        super().__init__()
        self.method = method
        self.key_codes, self.key_scale, self.key_low = Grown(), Grown(), Grown()  # [b,h,nk/per,d], [b,h,nk/g,d] twice
        self.value_codes, self.value_scale, self.value_low = Grown(), Grown(), Grown()  # [b,h,nv,d/per], [b,h,nv,d/g] twice

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.append(key_states, value_states)
        key, value = self.key_rows.rows, self.value_rows.rows
        keys, values = self._codes()
        if len(self.key_codes):
            key = _with_window(key, self.seen)
            keys.read(key[:, :, : self.seen - len(self.key_rows)])
        if len(self.value_codes):
            value = _with_window(value, self.seen)
            values.read(value[:, :, : len(self.value_codes)])
        if not self.record_past:
            self._compress()
        self.show()
        return key, value

    def _codes(self) -> tuple[Codes, Codes]:
        group, bits = self.method.group, self.method.bits
        keys = Codes(self.key_codes, self.key_scale, self.key_low, 2, group, bits)
        return keys, Codes(self.value_codes, self.value_scale, self.value_low, 3, group, bits)

    def _compress(self) -> None:
        """Move what is behind the windows into codes."""
        (nk, nv), (keys, values) = self.method.split(self.seen), self._codes()
        for held, rows, behind in (
            (keys, self.key_rows, nk - (self.seen - len(self.key_rows))),
            (values, self.value_rows, nv - len(self.value_codes)),
        ):
            if behind > 0:
                held.append(rows.rows[:, :, :behind])
                rows.slice(behind, len(rows))

    def crop(self, tokens_to_remove: int) -> None:
        left = self.seen - abs(tokens_to_remove)
        nk, nv = self.method.split(max(0, left))
        if left < 0 or nk < self.seen - len(self.key_rows) or nv < len(self.value_codes):
            raise SmeltError(
                f"kivi: the last {-tokens_to_remove} of {self.seen} tokens cannot be taken back, they have been quantized; "
                "call activate_past_recording() on the cache before tokens that may be taken back"
            )
        self.key_rows.slice(0, len(self.key_rows) - self.seen + left)
        self.value_rows.slice(0, len(self.value_rows) - self.seen + left)
        self.seen = left
        if self.is_initialized:
            self._compress()
        self.show()


def _with_window(window: Tensor, seen: int) -> Tensor:
    """[b, h, seen, d] that ends with the window; what comes before it is still to be filled."""
    out = window.new_empty((*window.shape[:2], seen, window.shape[3]))
    out[:, :, seen - window.shape[2] :] = window
    return out
