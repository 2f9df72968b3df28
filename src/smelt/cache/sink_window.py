"""StreamingLLM: attention sinks and a window of the newest tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.cache._layers import Evicting
from smelt.spec import Paper

__all__ = ["SinkWindow"]


@dataclass(frozen=True)
class SinkWindow(Evicting):
    """Keep the first `sinks` and the last `window` tokens: token t attends {0..sinks-1} and {t-window..t}.

    key and value [b, h, n, d] -> indices [b, h, min(n, sinks + window)], the same for every row and head.
    Bytes: 2 L b H d itemsize min(n, sinks + window), at most 1/8 more for room to grow. Decoding reads
    min(n, sinks + window) + 1 tokens per head instead of n + 1; a prompt given at once costs what it always costs.
    Raises SmeltError (runtime) for padded rows and under decoding methods that take tokens back.

    Differs from the paper: rotary angles stay those of the full text, where the paper numbers the positions
    anew inside the cache, so texts much longer than the trained context are not covered. A prompt given at once is
    attended in full and cut afterwards. The window counts the tokens before the current one.
    """

    paper: ClassVar = Paper("Efficient Streaming Language Models with Attention Sinks", "arXiv:2309.17453", "section 3.2, attention sinks")
    sinks: Annotated[int, Ge(0)] = 4
    window: Annotated[int, Ge(1)] = 1020  # tokens

    @classmethod
    def unlimited(cls) -> Self:
        return cls(window=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(sinks=3, window=21)

    def survivors(self, key: Tensor, value: Tensor) -> Tensor:
        n = key.shape[2]
        at = torch.arange(n, device=key.device)
        if n > self.kept(n):
            at = torch.cat([at[: self.sinks], at[n - self.window :]])
        return at.expand(*key.shape[:2], -1)

    def kept(self, tokens: int) -> int:
        return min(tokens, self.sinks + self.window)
