"""A bi-encoder that learns the scores of a model which reads both texts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from smelt.rank._reading import needs_model
from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import Dense, depth, relevant
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["DSE"]


@dataclass(frozen=True)
class DSE(Dense, Learns):
    """loss = mean_j (1 - alpha) BCE(z_j, y_j) + alpha (z_j - scale t_j)^2, z = <u, v> / sqrt(width), u = [h^L, h^(L-1), ...].

    u and v are the pooled states of the last `layers` layers side by side, t the grades of the teacher, y whether a
    passage is graded as high as the first of its list. The square asks for the teacher's score itself, not its margins
    (margin_mse() does), so a list's level is learned too.

    Shapes: vectors [n, layers * hidden] float32, each over width^(1/4); a list's scores and grades [b, n] -> [b]. Units: nats and squared
    units of the teacher's score. Cost: that of the held embedding(); the product and the index are `layers` times wider.

    Raises SmeltError for a judge that is no embedding(normalize=False), or one with a layer of its own.

    Differs from the paper: products are divided by sqrt(width), or z starts hundreds of units from the teacher's logits;
    z is the dot product, which can be indexed. Left out: the paper's head, an MLP on [u, v, u * v, |u - v|], which
    cannot (every pair would go through it), and teachers with more than one logit. States go through the final norm.
    """

    paper: ClassVar = Paper("Scalable Attentive Sentence-Pair Modeling via Distilled Sentence Embedding", "arXiv:1908.05161", "section 3")
    judge: Any = field(default_factory=lambda: Embedding(normalize=False))
    layers: Annotated[int, Ge(1)] = 4  # the last ones, all where there are fewer
    alpha: Annotated[float, Ge(0), Le(1)] = 0.5  # of the teacher's part
    scale: Annotated[float, Gt(0)] = 1.0  # of the grades
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding) or self.judge.normalize or self.judge.layer is not None:
            raise SmeltError(f"dse: judge={self.judge!r}; an embedding(normalize=False) without a layer of its own is expected")

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def places(self, model: Any) -> tuple[int, ...]:
        """The layers that are read, the last one first."""
        last = depth(model)
        return tuple(range(last, max(0, last - self.layers), -1))

    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        needs_model(model, "dse")
        return beside(self.judge.layers(texts, model, query, self.places(model.model)).unbind(1))

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        return self.judge.collate(lists, model, context)

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        each = self.judge.pairs(model, batch, self.places(model))
        queries, passages = beside([q for q, _ in each]), beside([p for _, p in each])
        keep = batch["keep"]
        scores = (queries[:, None] * passages.view(*keep.shape, -1)).sum(-1)
        return distilled(scores, self.scale * batch["grades"], relevant(batch["grades"], keep), keep, self.alpha)


def beside(vectors: Sequence[Tensor]) -> Tensor:
    """Several [b, d] -> [b, layers * d], over the fourth root of the width so that products are divided by its square root."""
    wide = torch.cat(list(vectors), -1)
    return wide / wide.shape[-1] ** 0.25


def distilled(scores: Tensor, grades: Tensor, good: Tensor, keep: Tensor, alpha: float) -> Tensor:
    """[b, n] each -> [b]: the mean over kept passages of (1 - alpha) cross-entropy + alpha squared difference."""
    each = binary_cross_entropy_with_logits(scores, good.to(scores.dtype), reduction="none")
    each = (1 - alpha) * each + alpha * (scores - grades).square()
    return (each * keep).sum(-1) / keep.sum(-1)
