"""One model that embeds at several depths: as deep as there is time for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.rank._reading import needs_model
from smelt.rank._training import Labelled
from smelt.rank._vectors import Towers, depth, exits
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["MultiExitEmbedding"]


@dataclass(frozen=True)
class MultiExitEmbedding(Towers):
    """loss = sum_k (k / K) L(e_k), e_k the vectors after the k-th of K `exits`, L what the judge loses; k = 1 is the shallowest.

    Deeper exits weigh more; shallow ones learn from them because they share parameters and target. Asked, texts are
    read up to layer `exit` only: its vectors are those of the truncated model, and time falls with depth. None is the
    deepest exit; exits=() are a quarter, a half, three quarters and all of the layers (rounded up).

    `judge` says how texts are read and what is lost: embedding() (InfoNCE), margin_mse() or vector_mse(). Both of a pair are
    read at the same exit: an index belongs to one exit.

    Shapes and units: those of the judge, and so is the cost of asking, times exit / layers. A training step is one
    forward and backward up to the deepest exit whose states stay until backward, and the loss of each.

    Raises SmeltError for a judge of another kind or with a layer of its own, for an `exit` that is not among `exits`
    and, when a model is read, for an exit it is too shallow for.

    Differs from the paper (reconstruction): there each exit has a pooled head of its own, whose shape is not
    established here; ours share the model's final norm, so an exit is the truncated checkpoint and adds nothing. The
    weights k / K are as remembered. Its exits are 4, 9, 18, 27 and 36 of 36, its pre-training is left out.
    """

    paper: ClassVar = Paper(
        "MoSE: Hierarchical Self-Distillation Enhances Early Layer Embeddings", "arXiv:2503.03008", "the multi-exit loss, reconstructed"
    )
    judge: Any = field(default_factory=Embedding)
    exits: tuple[Annotated[int, Ge(1)], ...] = ()
    exit: Annotated[int, Ge(1)] | None = None  # where it is read
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Towers) or isinstance(self.judge, MultiExitEmbedding):
            raise SmeltError(
                f"multi_exit_embedding: judge={self.judge!r} cannot be read at several depths; use embedding() or margin_mse()"
            )
        if self.judge.tower().layer is not None:
            raise SmeltError("multi_exit_embedding: the depth is `exit` here; leave layer out of its embedding()")
        if self.exit is not None and self.exits and self.exit not in self.exits:
            raise SmeltError(f"multi_exit_embedding: exit={self.exit} is none of the exits that are trained, {self.exits}")

    @property
    def copies(self) -> bool:  # type: ignore[override]
        return bool(self.judge.copies)

    def places(self, model: Any) -> tuple[int, ...]:
        """The exits in rising order, each once. `model` is the transformers model."""
        last = depth(model)
        if self.exits and max(self.exits) > last:
            raise SmeltError(f"multi_exit_embedding: an exit after layer {max(self.exits)}, but the model has {last} layers")
        return tuple(sorted(set(self.exits))) or exits(last)

    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        needs_model(model, "multi_exit_embedding")
        places = self.places(model.model)
        if self.exit is not None and self.exit > depth(model.model):
            raise SmeltError(f"multi_exit_embedding: exit={self.exit}, but the model has {depth(model.model)} layers")
        return self.tower().layers(texts, model, query, (self.exit or places[-1],))[:, 0]

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        return self.judge.collate(lists, model, context)

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        places = self.places(model)
        each = [self.judge.objective(q, p, batch) for q, p in self.tower().pairs(model, batch, places)]
        return (torch.stack(each) * torch.arange(1, len(each) + 1, device=each[0].device)[:, None]).sum(0) / len(each)

    def objective(self, queries: Tensor, passages: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.judge.objective(queries, passages, batch)
