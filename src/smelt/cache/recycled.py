"""Recycled Attention: between two full steps, read only what the last full step read most."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.nn.functional import cosine_similarity

from smelt.cache import KVCache
from smelt.cache._layers import Attending, Grown, Run, capacity
from smelt.cache._scored import weights
from smelt.model._walk import parts
from smelt.spec import Paper, SmeltError

__all__ = ["Recycled"]


@dataclass(frozen=True)
class Recycled(KVCache):
    """Step t reads {j <= t} when (t - t0) mod every = 0, else S and {t_full < j <= t}, S = top-K_j max_g softmax_j(q_full . k_j scale).

    Everything is kept. The first single token after a prompt is a full step; it leaves S, K = max(keep, share n) tokens
    per batch row and kv head, by the largest weight of the group's query heads. S is gathered once and new tokens are
    appended to it, so that a recycled step is plain attention over K + (steps since) rows. With `drift`, a step is full
    as well when the mean over heads of cos(q_t, q_full) is below it; a batch then steps together, as soon as
    one row asks for it. Calls of several tokens (a prompt, a block of assisted decoding) read everything and forget S.

    attend: query [b, Hq, 1, d]. Bytes: L b H (n + K + since) 2 d itemsize, before at most 1/8 for room to grow: it
    reads less and holds more than the full cache. With `drift` (and L b Hq d itemsize for q_full) the formula is the most that can
    be held. Rows read per step and head: n / every + (1 - 1 / every) (K + every / 2) on average, and the keys once
    more in a full step, whose weights attention does not give out.
    `crop` is exact for keys and values; S survives where the full step that chose it does, else the next step is full.
    Raises SmeltError: padded rows (runtime), because S is counted in tokens.

    On one CPU core, 8,192 tokens and heads of 64, a step's attention took 0.26 of the full one with the defaults (K = 1,024). On
    the embedded model, which reads mostly what is near, S recovers no more attention than as many recent tokens (60 steps on
    code, 1,500 tokens, K = 64: 0.72 against 0.73 and 0.72 against 0.78), and the paper's gain over a window does not show.

    Differs from the paper: the sizes of K and `every`, max over the group, cosines of rotated queries and a decision per
    layer are a reconstruction; the authors' code was not at hand. No continued training.
    """

    paper: ClassVar = Paper("Recycled Attention: Efficient inference for long-context language models", "arXiv:2411.05787", "section 3")
    padded: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = True
    attends: ClassVar[bool] = True
    every: Annotated[int, Ge(1)] = 10  # steps
    keep: Annotated[int, Ge(1)] = 64  # tokens
    share: Annotated[float, Ge(0), Le(1)] = 0.125  # of the tokens seen, where that is more than `keep`
    drift: Annotated[float, Ge(-1), Le(1)] | None = None

    @classmethod
    def unlimited(cls) -> Self:
        return cls(every=1)

    @classmethod
    def example(cls) -> Self:
        return cls(every=4, keep=8, share=0.0)

    def kept(self, tokens: int) -> int:
        """K after a full step with `tokens` tokens seen."""
        return min(tokens, max(self.keep, math.ceil(self.share * tokens)))

    def layer(self, config: Any, index: int) -> RecycledLayer:
        return RecycledLayer(self)

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        sizes, n = parts(config), prompt + written
        rows, asked = capacity(n), 0
        if written and self.every > 1:
            since = (written - 1) % self.every
            if self.drift is not None:  # each number of steps since may be true
                since, asked = min(written, self.every) - 1, sizes.heads
            rows += capacity(min(n, self.kept(n if self.drift is not None else n - since) + since))
        return sizes.layers * batch * (2 * sizes.kv_heads * rows + asked) * sizes.head_dim * itemsize


class RecycledLayer(Attending):
    """`near_keys` and `near_values` are S and what came since, empty where the next step is full."""

    is_croppable = True

    def __init__(self, method: Recycled) -> None:
        super().__init__()
        self.method = method
        self.near_keys, self.near_values, self.asked = Grown(), Grown(), Grown()  # asked: q_full [b, hq, 1, d], for drift
        self.full_at = 0  # tokens seen in the last full step; means nothing without near rows

    def attend(self, query: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        key, value = self.key_rows.rows, self.value_rows.rows
        if query.shape[2] > 1 or self.seen == 1 or mask is not None:
            self._forget()
        elif len(self.near_keys) and self.seen - self.full_at < self.method.every and not self._drifted(query):
            self.near_keys.append(key[:, :, -1:])
            self.near_values.append(value[:, :, -1:])
            return run(query, self.near_keys.rows, self.near_values.rows, None)
        elif self.method.every > 1:
            self._choose(query.detach(), run.scaling)
        return run(query, key, value, mask)

    def _choose(self, query: Tensor, scale: float) -> None:
        with torch.no_grad():
            score = weights(query, self.key_rows.rows, scale)[:, :, :, 0].amax(2)
        index = score.topk(self.method.kept(self.seen), sorted=False).indices.sort().values
        self.near_keys, self.near_values = picked(self.key_rows, index), picked(self.value_rows, index)
        self.full_at = self.seen
        if self.method.drift is not None:
            self.asked = Grown()
            self.asked.append(query)

    def _drifted(self, query: Tensor) -> bool:
        if self.method.drift is None:
            return False
        return bool(cosine_similarity(query.float(), self.asked.rows.float(), -1).mean((1, 2)).min() < self.method.drift)

    def _forget(self) -> None:
        self.near_keys, self.near_values, self.asked = Grown(), Grown(), Grown()

    def crop(self, tokens_to_remove: int) -> None:
        left = self.seen - abs(tokens_to_remove)
        if left < 0:
            raise SmeltError(f"recycled: {-tokens_to_remove} tokens cannot be taken back, only {self.seen} have been seen")
        if not len(self.near_keys) or left < self.full_at:
            self._forget()
        else:
            self.near_keys.slice(0, len(self.near_keys) - self.seen + left)
            self.near_values.slice(0, len(self.near_values) - self.seen + left)
        self.key_rows.slice(0, left)
        self.value_rows.slice(0, left)
        self.seen = left
        self.show()


def picked(rows: Grown, index: Tensor) -> Grown:
    """A copy of the rows `index` [b, h, m]; `rows` stays as it is."""
    found = Grown()
    found.store, found.count = rows.store, len(rows)
    found.gather(index)
    return found
