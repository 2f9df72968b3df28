"""SnapKV: the last queries of a prompt say which of its tokens stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d, pad

from smelt.cache._scored import Plan, Score, Scored, mass
from smelt.spec import Paper, SmeltError

__all__ = ["SnapKV"]


@dataclass(frozen=True)
class SnapKV(Scored):
    """Keep the `window` last tokens and the `budget` best of the others by pool(mean_{i in window} softmax_j(q_i . k_j scale)).

    The mean runs over the last `window` queries and the query heads of a kv head; `pool` is a max or mean over `kernel`
    neighbouring rows, stride 1, so that what stands beside a found token stays with it. Rows differ per batch row and kv head.

    When: a call of several tokens (a prompt, or a part of one) is attended in full, with all rows held, and then cut to
    budget + window rows. Single tokens are appended until budget + window + slack rows are held; the next one cuts again
    to budget + window, by the last `window` queries. Those queries are held for it.
    Bytes: L b (2 H rows + Hq min(n, window)) d itemsize, before at most 1/8 for room to grow, rows <= budget + window + slack.
    FLOPs: a cut costs 2 Hq window rows d and a copy of the rows that stay; decoding reads at most budget + window + slack + 1
    rows per head instead of n + 1.
    Raises SmeltError: an even `kernel`; padded rows and decoding methods that take tokens back (runtime).

    Differs from the paper: it cuts once, after the prompt, and appends from there on; the cuts while writing are added
    here to bound the memory (budget + window + slack above what is written repeats it). After a cut, neighbours are the
    neighbours among the rows that stayed. Scores are averaged over the group before pooling, so that grouped heads share
    their rows; the authors repeat the keys and choose per query head. Defaults are those of their runs on LongBench
    (window 32, max over 7); their code falls back to a mean over 5.
    """

    paper: ClassVar = Paper("SnapKV: LLM Knows What You are Looking for Before Generation", "arXiv:2404.14469", "section 4, listing 1")
    budget: Annotated[int, Ge(1)] = 992  # tokens beside the window
    window: Annotated[int, Ge(1)] = 32  # tokens
    kernel: Annotated[int, Ge(1)] = 7
    pool: Literal["max", "mean"] = "max"
    slack: Annotated[int, Ge(0)] = 64  # tokens

    def __post_init__(self) -> None:
        if self.kernel % 2 == 0:
            raise SmeltError(f"snapkv: kernel={self.kernel} is even, so its windows have no middle; {self.kernel + 1} has one")

    @classmethod
    def unlimited(cls) -> Self:
        return cls(budget=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(budget=16, window=4, kernel=3, slack=5)

    @property
    def plan(self) -> Plan:
        return Plan(first=0, last=self.window, best=self.budget, slack=self.slack, remember=self.window)

    def scorer(self, config: Any) -> Score:
        def score(query: Tensor, key: Tensor, value: Tensor, seen: int, scale: float) -> Tensor:
            asked = mass(query[:, :, -self.window :], key, scale)[:, :, : -self.window] / self.window
            pool = max_pool1d if self.pool == "max" else avg_pool1d
            return pad(pool(asked, self.kernel, stride=1, padding=self.kernel // 2), (0, self.window))

        return score
