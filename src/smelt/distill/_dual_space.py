"""From one model's hidden space to another's: attention between two token sequences, and the map that keeps logits."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention", "pooled", "projection", "scaled"]

OUTSIDE = -1e5  # score of a position that does not count


def scaled(x: Tensor, keep: Tensor) -> Tensor:
    """x / std(x), one standard deviation over all kept positions and columns. [b, s, d], [b, s] -> [b, s, d]"""
    weight = keep[..., None].to(x.dtype)
    count = (weight.sum() * x.shape[-1]).clamp(min=2)
    mean = (x * weight).sum() / count
    return x * (((x - mean).square() * weight).sum() / (count - 1)).clamp(min=1e-12).rsqrt()


def attention(query: Tensor, key: Tensor, keep: Tensor, teacher_keep: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax_j A [b, t, s], softmax_i A^T [b, s, t]), A = query key^T / sqrt(d): what a position takes of the other side.

    query [b, t, d], key [b, s, d]. Rows sum to one; positions that do not count get exactly zero from those that do.
    """
    score = query @ key.mT / key.shape[-1] ** 0.5
    score = score.masked_fill(~(keep[:, :, None] & teacher_keep[:, None, :]), OUTSIDE)
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    return score.softmax(-1), score.mT.softmax(-1)


def pooled(loss: Tensor, teacher_keep: Tensor, keep: Tensor) -> Tensor:
    """Losses of the teacher's positions [b, s] put on the student's [b, t]: the kept ones of a row have the same sum."""
    total = torch.where(teacher_keep, loss, 0.0).sum(-1, keepdim=True)
    return torch.where(keep, total / keep.sum(-1, keepdim=True).clamp(min=1), 0.0)


def projection(target: Tensor, source: Tensor, gram: Tensor | None = None) -> Tensor:
    """P [a, b] with h P source^T nearest to h target^T for every h: P = target^T source (source^T source)^+.

    target [v, a], source [v, b]; `gram` is (source^T source)^+ when it is known. For heads, h P is a hidden state of the
    source's space that says what h says in the target's: exactly, where target's columns are in the span of source's.
    Cost: 2 v b (a + b) operations, b^3 for the inverse.
    """
    if gram is None:
        gram = torch.linalg.pinv(source.mT @ source, hermitian=True)
    return target.mT @ source @ gram
