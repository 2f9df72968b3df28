"""ThinK: of the keys of old tokens only those channels that the queries use."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge, Lt
from torch import Tensor

from smelt.cache._narrow import Narrow, Narrowing, NarrowLayer, narrow_bytes
from smelt.model._walk import parts
from smelt.spec import Paper

__all__ = ["Think"]


@dataclass(frozen=True)
class Think(Narrowing):
    """q.k ~ sum_{j in S} q_j k_j for old keys, S the d' = d - floor(drop d) channels with the largest |Q_j|^2 |K_j|^2.

    Q the last `observed` queries of the first call, their squares averaged over the query heads of a group, K all keys
    held when the choice is made: at the end of the call in which the first token leaves the window of the last
    `window` tokens, for a prompt longer than that the prompt itself. One S per row and key/value head, the same size
    in all, kept from then on; keys that leave the window later lose the same channels. Values stay whole.

    Bytes of a layer, row and head with n tokens, before at most 1/8 for room to grow: ((n - window) d' + window d + n d)
    itemsize + 2 d', which saves drop / 2 of the cache for large n; until the choice is made 4 d min(observed, prompt)
    for the squared queries. Scores on old keys take 2 d' FLOPs per key instead of 2 d, in a matrix product that is really
    that narrow. A prompt given at once costs what it always costs.

    The choice depends on where the first call ends, so a prompt in pieces is not the prompt at once. `crop` is exact or
    raises: behind the window it needs `activate_past_recording()`. Raises SmeltError (runtime) for padded rows, whose
    padding would count in |K_j|.

    Differs from the paper: tokens written later are narrowed too (its code leaves them whole until the next
    compression). The score is the paper's greedy one: |Q_j|^2 |K_j|^2 is what leaving out channel j alone costs.
    """

    paper: ClassVar = Paper("ThinK: Thinner Key Cache by Query-Driven Pruning", "arXiv:2407.21018", "section 3.2, query-driven pruning")
    drop: Annotated[float, Ge(0), Lt(1)] = 0.4  # share of the key channels
    window: Annotated[int, Ge(1)] = 32  # tokens; a method that holds this one has a window of its own
    observed: Annotated[int, Ge(1)] = 32  # queries

    @classmethod
    def unlimited(cls) -> Self:
        return cls(drop=0.0)

    @classmethod
    def example(cls) -> Self:
        return cls(drop=0.5, window=8, observed=8)

    def narrow(self, config: Any, index: int) -> Channels:
        width = parts(config).head_dim
        return Channels(width - math.floor(self.drop * width), width, self.observed)

    def split(self, tokens: int) -> tuple[int, int]:
        """(keys that are narrow, values that are): values never."""
        return max(0, tokens - self.window), 0

    def layer(self, config: Any, index: int) -> NarrowLayer:
        return NarrowLayer(self.narrow(config, index), self.split)

    def bytes_held(self, config: Any, prompt: int, written: int = 0, itemsize: int = 4, batch: int = 1) -> int:
        tokens = prompt + written
        return narrow_bytes(self, config, prompt, tokens, self.split(tokens), itemsize, batch)


class Channels(Narrow):
    """Keys are the chosen channels, in order; the choice is their numbers."""

    def __init__(self, kept: int, width: int, observed: int) -> None:
        self.key_width, self.value_width, self.observed = kept, width, observed

    def to(self, device: torch.device) -> None:
        pass

    def table_bytes(self) -> int:
        return 0

    def choose(self, asked: Tensor, key: Tensor) -> Tensor:
        score = asked.sum(2) * key.float().square().sum(2)
        return score.topk(self.key_width, -1).indices.sort(-1).values[:, :, None].to(torch.int16)

    def keys(self, key: Tensor, start: int, chosen: Tensor | None) -> Tensor:
        assert chosen is not None, "channels are chosen before keys lose any"
        return key.gather(3, chosen.long().expand(-1, -1, key.shape[2], -1))

    def values(self, value: Tensor) -> Tensor:
        return value

    def scores(self, query: Tensor, rows: Tensor, chosen: Tensor | None) -> Tensor:
        return self.keys(query, 0, chosen) @ rows.transpose(2, 3)

    def mixed(self, weights: Tensor, rows: Tensor) -> Tensor:
        return weights @ rows
