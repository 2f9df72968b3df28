"""Plain next-token training: the baseline beside every distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from smelt.distill._divergence import wide
from smelt.spec import Paper

__all__ = ["CrossEntropy"]


@dataclass(frozen=True)
class CrossEntropy:
    """loss = -log q(x), nats per token; q student, x the next token of the data. No teacher is read.

    Shapes: student [..., v], labels [...] -> [...]. Gradient of the logits: q - onehot(x). Cost: one softmax.
    """

    paper: ClassVar = Paper("A Neural Probabilistic Language Model", "https://jmlr.org/papers/v3/bengio03a.html", "eq. 2")

    def __call__(self, student: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(wide(student.reshape(-1, student.shape[-1])), labels.reshape(-1), reduction="none")
        return loss.view(labels.shape)
