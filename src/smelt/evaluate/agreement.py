"""How closely a model answers like its teacher on held-out text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

from annotated_types import Ge
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._beside import Beside
from smelt.spec import Paper, SmeltError

__all__ = ["Agreement"]


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
        beside = Beside(variant, self, "agreement")
        far, same = [0.0] * len(beside.weights), [0.0] * len(beside.weights)
        for part in beside:
            apart, equal = compare(part.teacher, part.student)
            far[part.document] += apart
            same[part.document] += equal
        weights = beside.weights
        return [
            Metric("kl_to_teacher", sum(far) / sum(weights), "nats per token", "lower", tuple(far), weights),
            Metric("top1_agreement", sum(same) / sum(weights), "share of tokens", "higher", tuple(same), weights),
        ]


def compare(teacher: Tensor, student: Tensor) -> tuple[float, int]:
    """(sum of KL(teacher || student) in nats, number of equal arg-maxima) for logits [n, v] of both."""
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    return float((p.exp() * (p - q)).sum().double()), int((teacher.argmax(-1) == student.argmax(-1)).sum())
