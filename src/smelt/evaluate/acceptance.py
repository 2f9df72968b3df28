"""How many drafted tokens a larger model would keep: what a draft for speculative decoding is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._beside import Beside
from smelt.spec import Paper, SmeltError

__all__ = ["Acceptance"]


@dataclass(frozen=True)
class Acceptance(Probe):
    """acceptance = mean_i sum_v min(p(v | x_<i), q(v | x_<i)); block_efficiency = (1 - a^(length + 1)) / (1 - a), a the acceptance.

    q the variant as draft, p its teacher as target, both softmax(logits / temperature); temperature 0 is greedy decoding,
    where a token is kept when both have the same arg-max. sum_v min(p, q) = 1 - TVD(p, q) is the chance that the verification
    of speculative decoding keeps a token drawn from q. block_efficiency is what it gives in tokens per call of the target
    when `length` tokens are drafted and every one is kept with the same chance; at a = 1 it is length + 1.

    Prefixes are held-out text, over the windows of the probe perplexity (same settings, same meaning), not what a target
    would have written, and chances differ from place to place: the tokens per call that a decoder counts may differ. The
    target reads plainly; the draft through its cache when one is bound. Samples are sums per document, weights its tokens. Heads
    padded to different widths are compared on the columns both have.

    Cost: that of agreement, with which the teacher's answers are shared. Raises SmeltError without a teacher, for a teacher of another
    tokenizer (speculative decoding would refuse it), for one that is the very model an attention method is bound to, and
    for a model without a language head.
    """

    paper: ClassVar = Paper("Fast Inference from Transformers via Speculative Decoding", "arXiv:2211.17192", "theorem 3.5 and equation 1")
    temperature: Annotated[float, Ge(0)] = 1.0
    length: Annotated[int, Ge(1)] = 5  # tokens drafted per call
    tokens: Annotated[int, Ge(1)] = 16_384
    document: Annotated[int, Ge(1)] = 1536
    context: Annotated[int, Ge(1)] = 2048
    stride: Annotated[int, Ge(1)] = 1024
    batch: Annotated[int, Ge(1)] = 8
    prefill: Annotated[int, Ge(1)] = 256
    chunk: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        if self.stride > self.context:
            raise SmeltError(f"acceptance: stride={self.stride} is larger than context={self.context}, so tokens would be left out")

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=600, document=200, context=64, stride=32, batch=3, prefill=16, chunk=8)

    def __call__(self, variant: Variant) -> list[Metric]:
        beside = Beside(variant, self, "acceptance")
        kept = [0.0] * len(beside.weights)
        for part in beside:
            kept[part.document] += float(overlap(part.teacher, part.student, self.temperature).double().sum())
        rate = sum(kept) / sum(beside.weights)
        return [
            Metric("acceptance", rate, "share of drafted tokens", "higher", tuple(kept), beside.weights),
            Metric("block_efficiency", block_efficiency(rate, self.length), "tokens per target call", "higher"),
        ]


def overlap(target: Tensor, draft: Tensor, temperature: float) -> Tensor:
    """sum_v min(p_v, q_v) for logits [..., v] of both -> [...]; temperature 0: 1 where the arg-maxima are equal, else 0."""
    if not temperature:
        return (target.argmax(-1) == draft.argmax(-1)).float()
    return torch.minimum((target / temperature).softmax(-1), (draft / temperature).softmax(-1)).sum(-1)


def block_efficiency(rate: float, length: int) -> float:
    """1 + a + ... + a^length, without the 0 / 0 of the closed form at a = 1."""
    return sum(rate**i for i in range(length + 1))
