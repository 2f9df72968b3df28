"""How closely a model answers like its teacher on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self
from weakref import WeakKeyDictionary

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import batches, decoder, logits, windows
from smelt.evaluate._text import encoded, room
from smelt.model._load import same_tokenizer
from smelt.spec import Paper, SmeltError

__all__ = ["Agreement"]

KEPT = 1 << 29  # bytes of teacher answers kept for the next variant; above that the teacher is asked again
SLICE = 256  # positions compared at once
_answers: WeakKeyDictionary[Any, tuple[Any, list[Tensor]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Agreement(Probe):
    """kl_to_teacher = mean_i sum_v p(v | x_<i) ln(p(v | x_<i) / q(v | x_<i)); top1_agreement = mean_i [argmax p = argmax q].

    p teacher, q variant, nats per token, over the text and the windows of the probe perplexity (same settings, same
    meaning). The teacher reads plainly; the variant through its cache when one is bound. Samples are sums per
    document, weights its tokens. Heads padded to different widths are compared on the columns both have.

    Cost: one pass of the variant; one of the teacher for all variants together while its logits (4 * tokens
    * vocabulary bytes) fit 512 MB, else one each. Raises SmeltError without a teacher, for a teacher whose token ids
    mean something else (equal vocabulary size is not enough), for one that is the very model an attention method is
    bound to (it would answer through it), and for a model without a language head.
    """

    paper: ClassVar = Paper("Does Knowledge Distillation Really Work?", "arXiv:2106.05945", "agreement and predictive KL")
    tokens: Annotated[int, Ge(1)] = 16_384
    document: Annotated[int, Ge(1)] = 1536
    context: Annotated[int, Ge(1)] = 2048
    stride: Annotated[int, Ge(1)] = 1024
    batch: Annotated[int, Ge(1)] = 8
    prefill: Annotated[int, Ge(1)] = 256
    chunk: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        if self.stride > self.context:
            raise SmeltError(f"agreement: stride={self.stride} is larger than context={self.context}, so tokens would be left out")

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=600, document=200, context=64, stride=32, batch=3, prefill=16, chunk=8)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "agreement")
        if variant.teacher is None:
            raise SmeltError("agreement needs a teacher to compare with; there is none")
        if variant.teacher.model is model and variant.attention is not None:
            raise SmeltError(f"agreement: the teacher of '{variant.name}' is the model its attention is bound to; load the teacher apart")
        if not same_tokenizer(variant.tokenizer, variant.teacher.tokenizer):
            raise SmeltError(f"agreement: '{variant.name}' and its teacher do not share a tokenizer, so their ids mean different things")
        teacher = Variant("teacher", variant.teacher.model, variant.teacher.tokenizer)
        decoder(teacher, "agreement")
        documents = encoded(variant, self.tokens, self.document)
        context = min(room(model, self.context), room(teacher.model, self.context))
        cuts = [(at, *w) for at, d in enumerate(documents) for w in windows(len(d.ids), context, min(self.stride, context))]
        rows = [documents[at].ids[first:last] for at, first, last, _ in cuts]
        skip = [done - first - 1 for _, first, _, done in cuts]  # positions that an earlier window has scored
        kept = _kept(teacher, rows, self.batch)
        far, same = [0.0] * len(documents), [0.0] * len(documents)
        for part, ids in batches(model, rows, self.batch):
            answers = [kept[i] for i in part] if kept else next(logits(teacher, ids, prefill=1, chunk=1))[1]
            for start, piece in logits(variant, ids, prefill=self.prefill, chunk=self.chunk):
                for place, index in enumerate(part):
                    low, high = max(start, skip[index]), min(start + piece.shape[1], len(rows[index]))
                    for at in range(low, high, SLICE):
                        stop, document = min(at + SLICE, high), cuts[index][0]
                        apart, equal = compare(answers[place][at:stop], piece[place, at - start : stop - start])
                        far[document] += apart
                        same[document] += equal
        weights = tuple(float(len(d.ids) - 1) for d in documents)
        return [
            Metric("kl_to_teacher", sum(far) / sum(weights), "nats per token", "lower", tuple(far), weights),
            Metric("top1_agreement", sum(same) / sum(weights), "share of tokens", "higher", tuple(same), weights),
        ]


def compare(teacher: Tensor, student: Tensor) -> tuple[float, int]:
    """(sum of KL(teacher || student) in nats, number of equal arg-maxima) for logits [n, v] and [n, v']."""
    columns = min(teacher.shape[-1], student.shape[-1])
    teacher, student = teacher[:, :columns].to(student.device).float(), student[:, :columns].float()
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((p.exp() * (p - q)).sum().double()), int((teacher.argmax(-1) == student.argmax(-1)).sum())


def _kept(teacher: Variant, rows: list[list[int]], batch: int) -> list[Tensor] | None:
    """The teacher's logits of every row, kept while its weights stay as they are; None when they would not fit."""
    model = teacher.model
    head = model.get_output_embeddings().weight
    if sum(map(len, rows)) * head.shape[0] * head.element_size() > KEPT:
        return None
    state = ([(id(p), p._version) for p in model.parameters()], rows, batch)
    if model not in _answers or _answers[model][0] != state:
        found = [torch.empty(0)] * len(rows)
        for part, ids in batches(model, rows, batch):
            answer = next(logits(teacher, ids, prefill=1, chunk=1))[1]
            for place, index in enumerate(part):
                found[index] = answer[place, : len(rows[index])].clone()
        _answers[model] = (state, found)
    return _answers[model][1]
