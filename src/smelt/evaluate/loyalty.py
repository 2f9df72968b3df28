"""How loyal a compressed model is to its teacher: the same answers, the same probabilities, the same scores."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._beside import Beside
from smelt.spec import Paper, SmeltError

__all__ = ["Loyalty"]


@dataclass(frozen=True)
class Loyalty(Probe):
    """label_loyalty = mean [argmax p = argmax q]; probability_loyalty = mean (1 - sqrt(JSD_2(p, q))), JSD_2 in bits, both in [0, 1].

    p teacher, q variant, at every position of the text and the windows of the probe agreement (same settings). JSD_2(p, q)
    = (KL(p || m) + KL(q || m)) / (2 ln 2), m = (p + q) / 2: 1 at p = q, 0 where they share no token.
    regression_loyalty = mean max(0, 1 - |y_q - y_p| / (max y_p - min y_p)) of a score y, with score_pearson and
    score_spearman, the correlations of y_q and y_p; y is here the log-probability of the true next token, in nats. This
    third loyalty is ours: no definition of it was found. Its range is that of the teacher over all positions; where a
    side's scores are all equal, a correlation is 1 if both are and else 0.

    label_loyalty is agreement's top1_agreement under the paper's name, measured in the same pass. Samples are sums per document,
    weights its tokens; correlations have none. Cost, memory and errors: those of agreement, with which the teacher's
    answers are shared; 16 bytes a position besides.

    Differs from the paper: next tokens over the vocabulary instead of the classes of a task.
    """

    paper: ClassVar = Paper(
        "Beyond Preserved Accuracy: Evaluating Loyalty and Robustness of BERT Compression", "arXiv:2109.03228", "section 3"
    )
    tokens: Annotated[int, Ge(1)] = 16_384
    document: Annotated[int, Ge(1)] = 1536
    context: Annotated[int, Ge(1)] = 2048
    stride: Annotated[int, Ge(1)] = 1024
    batch: Annotated[int, Ge(1)] = 8
    prefill: Annotated[int, Ge(1)] = 256
    chunk: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        if self.stride > self.context:
            raise SmeltError(f"loyalty: stride={self.stride} is larger than context={self.context}, so tokens would be left out")

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=600, document=200, context=64, stride=32, batch=3, prefill=16, chunk=8)

    def __call__(self, variant: Variant) -> list[Metric]:
        beside = Beside(variant, self, "loyalty")
        found = [np.zeros((4, int(n))) for n in beside.weights]  # same label, probability loyalty, y teacher, y variant
        for part in beside:
            got = compare(part.teacher, part.student, part.following)
            found[part.document][:, part.at : part.at + len(part.following)] = got.cpu().numpy()
        return _metrics(found)


def compare(teacher: Tensor, student: Tensor, following: Tensor) -> Tensor:
    """[4, n] of logits [n, v] of both and ids [n]: same first choice, 1 - sqrt(JSD_2), log p and log q of the next token."""
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    # log m - log p = log((1 + q/p) / 2), exactly 0 at p = q; beyond e^80 the smaller term counts nothing
    gap = (log_q - log_p).nan_to_num(0.0, 80.0, -80.0).clamp(-80, 80)
    apart = log_p.exp() * torch.log1p(torch.expm1(gap) / 2) + log_q.exp() * torch.log1p(torch.expm1(-gap) / 2)
    divergence = (apart.sum(-1).double() / (-2 * math.log(2))).clamp(0, 1)
    same = teacher.argmax(-1) == student.argmax(-1)
    scores = [log.gather(-1, following[:, None])[:, 0].double() for log in (log_p, log_q)]
    return torch.stack([same.double(), 1 - divergence.sqrt(), *scores])


def _metrics(found: list[np.ndarray]) -> list[Metric]:
    """From [4, n] of every document."""
    y_p, y_q = (np.concatenate([part[which] for part in found]) for which in (2, 3))
    width = max(np.ptp(y_p), 1e-30)  # of one score only: equal or not at all loyal
    regression = [np.maximum(0, 1 - np.abs(part[3] - part[2]) / width) for part in found]
    weights = tuple(float(part.shape[1]) for part in found)

    def ratio(name: str, unit: str, parts: list[np.ndarray]) -> Metric:
        samples = tuple(float(part.sum()) for part in parts)
        return Metric(name, sum(samples) / sum(weights), unit, "higher", samples, weights)

    return [
        ratio("label_loyalty", "share of tokens", [part[0] for part in found]),
        ratio("probability_loyalty", "1 - sqrt(JSD)", [part[1] for part in found]),
        ratio("regression_loyalty", "1 - error / range", regression),
        Metric("score_pearson", _correlation(y_q, y_p), "correlation", "higher"),
        Metric("score_spearman", _correlation(_ranks(y_q), _ranks(y_p)), "rank correlation", "higher"),
    ]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size else float(not a.any() and not b.any())


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, at, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[at]
