"""Expected Attention: what queries to come will read, from the mean and covariance of those seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import pad

from smelt.cache._scored import Plan, Score, Scored
from smelt.model._rotary import Rotary
from smelt.spec import Paper, SmeltError

__all__ = ["ExpectedAttention"]


@dataclass(frozen=True)
class ExpectedAttention(Scored):
    """score_j = (softmax_j(s m . k_j + s^2 k_j . C k_j / 2) + epsilon) |v_j|, m = R mu, C = R cov R^T, R = mean of R_p, p < horizon.

    mu and cov are those of the queries before rotary angles, per query head, without the queries of the first `sinks`
    tokens; R_p turns by the angle of the p-th position to come, s is the model's scale. For Gaussian queries
    exp(s m . k + s^2 k . C k / 2) is E[exp(s q . k)] exactly. The softmax runs over the rows held but the sinks; its mean over
    the query heads of a kv head counts. The `budget` rows that stay are the first `sinks`, the last `recent` and the best
    of the others; they differ per batch row and kv head.

    When: a call of several tokens (a prompt, or a part of one) is attended in full, with all rows held, and then cut to
    `budget` rows, by the queries of the call. Single tokens are appended until budget + slack rows are held; the next one
    cuts again to `budget`. `memory` latest queries are held for it, and fill up a call that brings fewer.
    Bytes: L b (2 H rows + Hq min(n, memory)) d itemsize, before at most 1/8 for room to grow, rows <= budget + slack.
    FLOPs: a cut of n rows costs 2 Hq n d^2 twice (covariance, quadratic form) and 4 Hq n d bytes of scratch at a time;
    decoding reads at most budget + slack + 1 rows per head instead of n + 1.
    Raises SmeltError: budget not above sinks + recent; a model whose keys Rotary cannot turn back; padded rows and decoding
    methods that take tokens back (runtime).

    On the embedded model, read on in chunks of 64 with 256 rows, it costs more than a window does (loss 6 % above the full
    cache, 3 % with recent=128, 1.5 % for sink_window): that text asks for what is near.

    Differs from the paper: |v| stands for the norm of what the value adds to the residual stream, |W_o v| (so does the
    authors' kvpress). Every head keeps the same number of rows, where their best figures choose it per head. recent=0 is
    theirs; queries to come right away read the newest tokens more than an average over `horizon` positions says, so
    writing on needs some. Reconstruction: `memory`, `slack` and their sizes; kvpress buffers hidden states in the same way.
    """

    paper: ClassVar = Paper(
        "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", "arXiv:2510.00636", "section 3"
    )
    budget: Annotated[int, Ge(1)] = 1024  # tokens, sinks and recent ones included
    sinks: Annotated[int, Ge(0)] = 4  # tokens
    recent: Annotated[int, Ge(0)] = 0  # tokens
    horizon: Annotated[int, Ge(1)] = 512  # positions to come
    epsilon: Annotated[float, Ge(0)] = 0.0
    memory: Annotated[int, Ge(1)] = 128  # queries
    slack: Annotated[int, Ge(0)] = 64  # tokens

    def __post_init__(self) -> None:
        if self.budget <= self.sinks + self.recent:
            raise SmeltError(
                f"expected_attention: budget={self.budget} leaves nothing to choose beside sinks={self.sinks} and recent={self.recent}"
            )

    @classmethod
    def unlimited(cls) -> Self:
        return cls(budget=1 << 40)

    @classmethod
    def example(cls) -> Self:
        return cls(budget=20, sinks=2, recent=2, horizon=16, memory=10, slack=5)

    @property
    def plan(self) -> Plan:
        choose = self.budget - self.sinks - self.recent
        return Plan(first=self.sinks, last=self.recent, best=choose, slack=self.slack, remember=self.memory)

    def scorer(self, config: Any) -> Score:
        rotary = Rotary(config)

        def score(query: Tensor, key: Tensor, value: Tensor, seen: int, scale: float) -> Tensor:
            first = seen - query.shape[2]
            skip = max(0, self.sinks - first)
            positions = torch.arange(first + skip, seen, device=query.device)
            plain = rotary.turn(query[:, :, skip:].float(), positions, back=True)
            mean = plain.mean(2, keepdim=True)
            plain = plain - mean
            turn = ahead(rotary, key.shape[3], seen, self.horizon, key.device)
            mean = mean @ turn.T
            spread = turn @ (plain.transpose(2, 3) @ plain / plain.shape[2]) @ turn.T
            rows = key[:, :, None, self.sinks :].float()  # [b, h, 1, n, d] against [b, h, group, ., d]
            mean, spread = (x.unflatten(1, (key.shape[1], -1)) for x in (mean, spread))
            expected = scale * (mean @ rows.transpose(3, 4)).squeeze(3) + scale**2 / 2 * ((rows @ spread) * rows).sum(-1)
            share = expected.softmax(-1).mean(2) + self.epsilon
            return pad(share * value[:, :, self.sinks :].float().norm(dim=-1), (self.sinks, 0))

        return score


def ahead(rotary: Rotary, width: int, seen: int, horizon: int, device: torch.device) -> Tensor:
    """R [width, width]: the mean of the rotations (scaling included) to positions seen .. seen + horizon - 1."""
    cos, sin = (angle.mean(0) for angle in rotary.angles(torch.arange(seen, seen + horizon, device=device)))
    turn, half = torch.eye(width, device=device), rotary.width // 2
    part = torch.diag(cos) + torch.diag(sin[:half], -half) - torch.diag(sin[half:], half)
    turn[: rotary.width, : rotary.width] = part * rotary.scaling
    return turn
