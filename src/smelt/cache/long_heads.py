"""LongHeads: each head reads the few chunks it needs, at positions the model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from smelt.cache import KVCache
from smelt.cache._blocks import attended
from smelt.cache._layers import Attending, Grown, Run, capacity
from smelt.model._rotary import Rotary
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["LongHeads"]


@dataclass(frozen=True)
class LongHeads(KVCache):
    """S = {0, c-1, c} + top-(k-3)_i q . v_i, v_i = softmax(mean(O_i) K_i' / sqrt d) K_i, O_i = attention(Q_i, K_i, V_i) in chunk i.

    k = `chunks`, w = `size`, c the chunk of the query; a query at p < k w reads everything before it, which is plain attention. From k w on
    every query head reads its own k chunks, in order, at positions 0 .. k w - 1: chunk j of S stands at j w, the query at
    (k-1) w + p mod w, so no position is beyond k w - 1 however long the text. O_i is not causal and has rotary angles that start
    anew in the chunk; q, K_i and v_i have none. v_i is per query head, [b, hq, n / w, d].

    Keys are held with the angle of their place in the chunk, so that reading turns the query, once per slot, and no key.
    The queries of a prompt go chunk by chunk: those of one chunk share chunks 0, c-1 and c, three dense products; the other
    k-3 go chunk by chunk, one product for all queries that chose it (see `_blocks.attended`). Nothing of [n, n] is made. Later tokens
    of a chunk change the size of such a product, and so earlier outputs by rounding, 1e-6, and by nothing else.

    Bytes: 2 n d per kv head, and (n / w + n mod w) d per query head for v_i and the queries of the open chunk (at most 1/8 more).
    FLOPs per query head: 4 k w d + 2 d n / w, for n > k w; up to there those of the full cache and, per step, 6 n d per
    kv head to turn the keys. It holds more than the full cache and goes beyond the trained
    length. A step at n = 8,192 (8 heads over 2, k w = 2,048) took 1.5 to 1.9 of a full one here, a prompt 1.6: time is saved far behind.

    attend: [b, hq, t, d] -> [b, t, hq, d]. `crop` is exact or raises: back into the open chunk, or anywhere behind
    `activate_past_recording()`. Raises SmeltError: padded rows (runtime), models whose keys cannot be turned back.

    Differs from the paper: tokens of a prompt are not read one by one; no offloading. Beyond k w tokens the softmax is this
    file's own, so an attention method bound beside it acts on the first k w only.
    That v_i is made of keys without angles is a reconstruction.
    """

    paper: ClassVar = Paper("LongHeads: Multi-Head Attention is Secretly a Long Context Processor", "arXiv:2402.10685", "section 2")
    padded: ClassVar[bool] = False
    attends: ClassVar[bool] = True
    keeps_all: ClassVar[bool] = True
    rounds_ahead: ClassVar[bool] = True
    size: Annotated[int, Ge(1)] = 256  # tokens of a chunk
    chunks: Annotated[int, Ge(3)] = 16  # read by each head, the first and the newest two among them

    @classmethod
    def unlimited(cls) -> Self:
        return cls(chunks=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(size=16, chunks=4)

    def layer(self, config: Any, index: int) -> LongHeadsLayer:
        return LongHeadsLayer(self, Rotary(config))

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        n, sizes = prompt + written, parts(config)
        rows = 2 * sizes.kv_heads * capacity(n) + sizes.heads * (capacity(n // self.size) + capacity(n % self.size))
        return sizes.layers * (batch * rows * sizes.head_dim * itemsize + Rotary(config).frequency.untyped_storage().nbytes())


class LongHeadsLayer(Attending):
    """Keys turned to their place in the chunk, values, chunk vectors, and the queries of the chunk that is not full yet."""

    is_croppable = True

    def __init__(self, method: LongHeads, rotary: Rotary) -> None:
        super().__init__()
        self.method, self.rotary = method, rotary
        self.vectors, self.query_rows = Grown(), Grown()  # [b, hq, n / w, d], [b, hq, n mod w, d] without angles

    def attend(self, query: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        w, start = self.method.size, self.seen - query.shape[2]
        at = torch.arange(start, self.seen, device=query.device)
        fresh = self.key_rows.rows[:, :, start:]
        fresh.copy_(self.rotary.turn(self.rotary.turn(fresh, at, back=True), at % w))
        bare = self.rotary.turn(query, at, back=True)
        self.query_rows.append(bare)
        self._complete()
        outputs = []
        full = self.method.chunks * w  # positions from here on choose chunks
        if start < full:
            stop = min(full, self.seen)
            where = torch.arange(stop, device=query.device) // w * w
            key = self.rotary.turn(self.key_rows.rows[:, :, :stop], where)
            seen = None if mask is None else mask[:, :, : stop - start, :stop]
            outputs.append(run(query[:, :, : stop - start], key, self.value_rows.rows[:, :, :stop], seen))
        for first in range(max(start, full) // w * w, self.seen, w):
            low, high = max(first, start, full), min(first + w, self.seen)
            if low < high:
                outputs.append(self._read(bare[:, :, low - start : high - start], low, run.scaling))
        return torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]

    def _complete(self) -> None:
        """Chunk vectors of the chunks that are full now; their queries are let go."""
        w, done = self.method.size, len(self.vectors)
        first, stop = self.seen - len(self.query_rows), self.seen // w * w
        if stop > done * w:
            groups = self.query_rows.rows.shape[1] // self.key_rows.rows.shape[1]
            inside = torch.arange(w, device=self.device)
            query = self.query_rows.rows[:, :, done * w - first : stop - first].unflatten(2, (-1, w))
            key, value = (
                grown.rows[:, :, done * w : stop].unflatten(2, (-1, w)).repeat_interleave(groups, 1)
                for grown in (self.key_rows, self.value_rows)
            )
            query, bare = (self._within(part, inside, back) for part, back in ((query, False), (key, True)))
            middle = scaled_dot_product_attention(query, key, value).float().mean(3, keepdim=True).to(key.dtype)
            self.vectors.append(scaled_dot_product_attention(middle, bare, bare).squeeze(3))
        if not self.record_past:
            self.query_rows.slice(max(0, stop - first), len(self.query_rows))

    def _within(self, x: Tensor, inside: Tensor, back: bool) -> Tensor:
        """Turn x [b, h, m, w, d] by places inside the chunk."""
        return self.rotary.turn(x.flatten(1, 2), inside, back).view(x.shape)

    def _chunk(self, index: int, stop: int) -> tuple[Tensor, Tensor]:
        rows = slice(index * self.method.size, min((index + 1) * self.method.size, stop))
        return self.key_rows.rows[:, :, rows], self.value_rows.rows[:, :, rows]

    def select(self, bare: Tensor, c: int) -> Tensor:
        """Chunks [b, hq, m, k - 3] besides 0, c - 1 and c, rising, for queries without angles in chunk c >= k."""
        score = bare.float() @ self.vectors.rows[:, :, 1 : c - 1].float().mT
        return score.topk(self.method.chunks - 3, -1).indices.add(1).sort(-1).values

    def _read(self, bare: Tensor, low: int, scaling: float) -> Tensor:
        """Queries of one chunk, without angles [b, hq, m, d], the first at `low` -> [b, m, hq, d]."""
        w, k, c = self.method.size, self.method.chunks, low // self.method.size
        b, heads, m, d = bare.shape
        kv = self.key_rows.rows.shape[1]
        inside = torch.arange(low % w, low % w + m, device=bare.device)
        away = (w * torch.arange(k - 1, -1, -1, device=bare.device)[:, None] + inside).flatten()  # slot j stands k - 1 - j chunks back
        turned = self.rotary.turn(bare.repeat(1, 1, k, 1), away).unflatten(2, (k, m)).float() * scaling  # [b, hq, k, m, d]
        shared = [self._chunk(i, low + m) for i in (0, c - 1, c)]
        scores = []
        for slot, (key, _) in zip((0, k - 2, k - 1), shared, strict=True):
            scores.append((turned[:, :, slot].reshape(b, kv, -1, d) @ key.float().mT).view(b, heads, m, -1))
        later = torch.arange(shared[2][0].shape[2], device=bare.device) > inside[:, None]
        scores[2] = scores[2].masked_fill(later, float("-inf"))
        near = torch.cat(scores, -1)
        value = torch.cat([v for _, v in shared], 2).float()
        top = near.amax(-1, keepdim=True)
        if k > 3:
            far, peak, total = attended(turned[:, :, 1 : k - 2].transpose(2, 3), self.select(bare, c), self.key_rows, self.value_rows, w)
            top = torch.maximum(top, peak)
        p = (near - top).exp()
        out, below = (p.view(b, kv, -1, p.shape[-1]) @ value).view(b, heads, m, d), p.sum(-1, keepdim=True)
        if k > 3:
            fade = (peak - top).exp()
            out, below = out + far * fade, below + total * fade
        return (out / below).to(bare.dtype).transpose(1, 2)

    def crop(self, tokens_to_remove: int) -> None:
        left = self.seen - abs(tokens_to_remove)
        first, full = self.seen - len(self.query_rows), max(0, left) // self.method.size
        if left < 0 or full * self.method.size < first:
            raise SmeltError(
                f"long_heads: {-tokens_to_remove} of {self.seen} tokens cannot be taken back, the queries of their chunk are gone; "
                "call activate_past_recording() on the cache before tokens that may be taken back"
            )
        if not self.is_initialized:
            return
        for grown, rows in ((self.key_rows, left), (self.value_rows, left), (self.vectors, full)):
            grown.slice(0, min(rows, len(grown)))
        self.query_rows.slice(full * self.method.size - first, left - first)
        self.seen = left
        self.show()
