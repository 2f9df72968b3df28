"""How many drafted tokens a larger model would keep: what a draft for speculative decoding is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import batches, decoder, logits, windows
from smelt.evaluate._text import encoded, room
from smelt.model._load import same_tokenizer
from smelt.spec import Paper, SmeltError

__all__ = ["Acceptance"]

SLICE = 256  # positions compared at once


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

    Cost: one pass of the variant and one of the teacher. Raises SmeltError without a teacher, for a teacher of another
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
        model = decoder(variant, "acceptance")
        if variant.teacher is None:
            raise SmeltError("acceptance needs a teacher, the target that the draft writes for; there is none")
        if variant.teacher.model is model and variant.attention is not None:
            raise SmeltError(f"acceptance: the teacher of '{variant.name}' is the model its attention is bound to; load the teacher apart")
        if not same_tokenizer(variant.tokenizer, variant.teacher.tokenizer):
            raise SmeltError(f"acceptance: '{variant.name}' and its teacher do not share a tokenizer, so it cannot draft for it")
        target = Variant("teacher", variant.teacher.model, variant.teacher.tokenizer)
        decoder(target, "acceptance")
        documents = encoded(variant, self.tokens, self.document)
        context = min(room(model, self.context), room(target.model, self.context))
        cuts = [(at, *w) for at, d in enumerate(documents) for w in windows(len(d.ids), context, min(self.stride, context))]
        rows = [documents[at].ids[first:last] for at, first, last, _ in cuts]
        skip = [done - first - 1 for _, first, _, done in cuts]  # positions that an earlier window has scored
        kept = [0.0] * len(documents)
        for part, ids in batches(model, rows, self.batch):
            answers = next(logits(target, ids.to(target.model.device), prefill=1, chunk=1))[1]
            for start, piece in logits(variant, ids, prefill=self.prefill, chunk=self.chunk):
                for place, index in enumerate(part):
                    low, high = max(start, skip[index]), min(start + piece.shape[1], len(rows[index]))
                    for at in range(low, high, SLICE):
                        stop = min(at + SLICE, high)
                        shared = overlap(answers[place, at:stop], piece[place, at - start : stop - start], self.temperature)
                        kept[cuts[index][0]] += float(shared.double().sum())
        weights = tuple(float(len(d.ids) - 1) for d in documents)
        rate = sum(kept) / sum(weights)
        return [
            Metric("acceptance", rate, "share of drafted tokens", "higher", tuple(kept), weights),
            Metric("block_efficiency", block_efficiency(rate, self.length), "tokens per target call", "higher"),
        ]


def overlap(target: Tensor, draft: Tensor, temperature: float) -> Tensor:
    """sum_v min(p_v, q_v) for logits [..., v] and [..., v'] -> [...]; temperature 0: 1 where the arg-maxima are equal, else 0."""
    columns = min(target.shape[-1], draft.shape[-1])
    target, draft = target[..., :columns].to(draft.device).float(), draft[..., :columns].float()
    if not temperature:
        return (target.argmax(-1) == draft.argmax(-1)).float()
    return torch.minimum((target / temperature).softmax(-1), (draft / temperature).softmax(-1)).sum(-1)


def block_efficiency(rate: float, length: int) -> float:
    """1 + a + ... + a^length, without the 0 / 0 of the closed form at a = 1."""
    return sum(rate**i for i in range(length + 1))
