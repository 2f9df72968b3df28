"""H2O: the tokens that drew most attention so far, and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from annotated_types import Ge
from torch import Tensor

from smelt.cache._scored import Plan, Score, Scored, mass
from smelt.spec import Paper

__all__ = ["H2O"]


@dataclass(frozen=True)
class H2O(Scored):
    """Keep the `recent` newest tokens and the `heavy` others of largest sum_i softmax_j(q_i . k_j scale), i over all queries seen.

    The sum of a token counts every query since it came, mean over the query heads of a kv head, each softmax over the
    rows held at that time; a token that was dropped is gone with its sum. Rows differ per batch row and kv head.

    When: a call of several tokens (a prompt, or a part of one) is attended in full, with all rows held, and then cut to
    heavy + recent rows. Single tokens are appended until heavy + recent + slack rows are held; the next one cuts again
    to heavy + recent. slack=0 drops one token a step and copies all rows for it.
    Bytes: L b H rows (2 d itemsize + 4), before at most 1/8 for room to grow, rows <= heavy + recent + slack.
    FLOPs: every query's weights are computed a second time, since attention does not give them out: 2 Hq d n^2 / 2 more
    for a prompt of n tokens, in pieces of 4M weights (no [n, n] is held), and 2 Hq rows d more per step, which reads the
    keys twice: 1.5 times the bytes of heavy + recent + slack + 1 rows instead of n + 1.
    On one CPU core, 8,192 tokens and heads of 64: the prompt's attention took 2.6 times as long, a step 0.17 of the full
    cache's with the defaults and 0.35 with slack=0.
    Raises SmeltError (runtime): padded rows; decoding methods that take tokens back.

    Differs from the paper: with slack > 0 tokens stay up to `slack` steps longer than the greedy rule lets them. The
    weights of grouped heads are averaged, so that they share their rows. Rotary angles stay those of the full text.
    Old tokens have been seen by more queries and so have larger sums; like the paper, this does not correct it.
    """

    paper: ClassVar = Paper(
        "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", "arXiv:2306.14048", "algorithm 1"
    )
    heavy: Annotated[int, Ge(1)] = 512  # tokens
    recent: Annotated[int, Ge(1)] = 512  # tokens
    slack: Annotated[int, Ge(0)] = 32  # tokens

    @classmethod
    def unlimited(cls) -> Self:
        return cls(heavy=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(heavy=12, recent=8, slack=3)

    @property
    def plan(self) -> Plan:
        return Plan(first=0, last=self.recent, best=self.heavy, slack=self.slack, remember=None)

    def scorer(self, config: Any) -> Score:
        def score(query: Tensor, key: Tensor, value: Tensor, seen: int, scale: float) -> Tensor:
            return mass(query, key, scale)

        return score
