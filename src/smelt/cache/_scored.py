"""What caches share that drop rows by a score from the queries: the plan of which rows stay, the layer, attention weights.

The rule of all of them: attention first sees every row held and the new tokens; then, where more rows are held than the plan
allows, the first ones, the last ones and the best scored between them stay. A call of several tokens (a prompt, a part of
one) is cut to `limit` rows at once. Single tokens are let in until `slack` more are held, so that the copy of all rows is
made once in slack + 1 steps. Rows differ by batch row and kv head, their number does not.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from smelt.cache import KVCache
from smelt.cache._layers import Attending, Grown, Run, capacity
from smelt.model._walk import parts
from smelt.spec import SmeltError

__all__ = ["Plan", "Score", "Scored", "ScoredLayer", "best", "mass", "weights"]

AT_ONCE = 1 << 22  # attention weights held at one time, elements

# (query [b, hq, t, d], key [b, h, n, d], value [b, h, n, d], tokens seen, what the model
# multiplies q . k by) -> score [b, h, n] float32 of every row. The queries are those of the last t tokens seen, whose rows are the last t.
Score = Callable[[Tensor, Tensor, Tensor, int, float], Tensor]


@dataclass(frozen=True)
class Plan:
    """Which rows stay: `first` and `last` ones always, the `best` of the others."""

    first: int
    last: int
    best: int
    slack: int
    remember: int | None  # None: each query is scored as it comes and scores add up; else so many latest queries are held

    @property
    def limit(self) -> int:
        return self.first + self.last + self.best

    def rows(self, prompt: int, written: int) -> int:
        """Rows of one head after a prompt in one call and `written` tokens one by one."""
        rows, most = min(prompt, self.limit) + written, self.limit + self.slack
        return rows if rows <= most else self.limit + (rows - most - 1) % (self.slack + 1)


def weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """softmax(scale q . k) float32 [b, h, hq/h, t, n] of query [b, hq, t, d] and key [b, h, n, d].

    The last t rows are those of the queries; a query sees the rows up to its own.
    """
    t, n = query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    scores = (grouped.float() @ key.float().transpose(2, 3)).mul_(scale).unflatten(2, (-1, t))
    if t > 1:
        scores.masked_fill_(torch.ones(t, n, dtype=torch.bool, device=key.device).triu(n - t + 1), -torch.inf)
    return scores.softmax(-1)


def mass(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """`weights` summed over the queries, mean over the heads of a group: [b, h, n]. At most AT_ONCE weights at a time."""
    (b, heads, t, _), (h, n) = query.shape, key.shape[1:3]
    total = torch.zeros(b, h, n, device=key.device)
    step = max(1, AT_ONCE // (b * heads * n))
    for start in range(0, t, step):
        stop = min(start + step, t)
        seen = n - t + stop
        total[:, :, :seen] += weights(query[:, :, start:stop], key[:, :, :seen], scale).sum(3).mean(2)
    return total


def best(score: Tensor, plan: Plan) -> Tensor:
    """score [b, h, n], n > plan.limit -> indices [b, h, limit] of the rows that stay, in order."""
    b, h, n = score.shape
    at = torch.arange(n, device=score.device).expand(b, h, n)
    middle = score[:, :, plan.first : n - plan.last].topk(plan.best, sorted=False).indices.sort().values
    return torch.cat([at[:, :, : plan.first], middle + plan.first, at[:, :, n - plan.last :]], 2)


class ScoredLayer(Attending):
    """`queries` [b, hq, <= remember, d], the latest, or `scores` [b, h, rows], the sums so far: the plan says which."""

    is_croppable = False

    def __init__(self, plan: Plan, score: Score) -> None:
        super().__init__()
        self.plan, self.score = plan, score
        self.queries, self.scores = Grown(), Grown()

    def attend(self, query: Tensor, mask: Tensor | None, run: Run) -> Tensor:
        out = run(query, self.key_rows.rows, self.value_rows.rows, mask)
        with torch.no_grad():
            self._take(query.detach(), run.scaling)
        self.show()
        return out

    def _take(self, query: Tensor, scale: float) -> None:
        key, value = self.key_rows.rows, self.value_rows.rows
        crowded = key.shape[2] > self.plan.limit + (self.plan.slack if query.shape[2] == 1 else 0)
        if self.plan.remember is None:
            added = self.score(query, key, value, self.seen, scale)
            if len(self.scores):
                added += pad(self.scores.rows, (0, query.shape[2]))
            self.scores = Grown()
            self.scores.append(added)
        else:
            if len(self.queries) and query.shape[2] < self.plan.remember:
                query = torch.cat([self.queries.rows, query], 2)
            self.queries = Grown()
            self.queries.append(query[:, :, -self.plan.remember :])
        if crowded:
            index = best(self.scores.rows if self.plan.remember is None else self.score(query, key, value, self.seen, scale), self.plan)
            self.key_rows.gather(index)
            self.value_rows.gather(index)
            if self.plan.remember is None:
                self.scores.gather(index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return len(self.key_rows) + query_length, self.seen - len(self.key_rows)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise SmeltError("this cache has dropped tokens and cannot go back; assisted decoding needs a cache that keeps them")


class Scored(KVCache):
    """A method that drops rows by a score: it says how many stay and how rows are scored, the layers do the rest."""

    evicts: ClassVar[bool] = True
    croppable: ClassVar[bool] = False
    attends: ClassVar[bool] = True

    @property
    @abstractmethod
    def plan(self) -> Plan: ...

    @abstractmethod
    def scorer(self, config: Any) -> Score: ...

    def layer(self, config: Any, index: int) -> ScoredLayer:
        return ScoredLayer(self.plan, self.scorer(config))

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        sizes, plan = parts(config), self.plan
        rows = capacity(plan.rows(prompt, written))
        held = 2 * sizes.kv_heads * rows * sizes.head_dim * itemsize
        if plan.remember is None:
            held += sizes.kv_heads * rows * 4
        else:
            held += sizes.heads * capacity(min(prompt + written, plan.remember)) * sizes.head_dim * itemsize
        return sizes.layers * batch * held
