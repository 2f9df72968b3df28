"""A small embedder learns its teacher's vectors themselves, so that it can stand in the teacher's place in an index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smelt.rank._training import Labelled
from smelt.rank._vectors import Towers
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["VectorMSE"]


@dataclass(frozen=True)
class VectorMSE(Towers):
    """loss = mean over the texts x of a list, query and passages alike, of |e(x) - t(x)|^2, t the vectors of the teacher.

    Every text says `width` numbers of the teacher's where a margin says one, and needs no grades and no negatives: each text
    has its target for itself. Of unit vectors, as embedding() makes them, it is 2 - 2 cos(e, t).

    `judge` is the embedding() that is trained and asked, `labels` the one that the teacher makes its vectors with. They are
    asked for once per text and kept, so epochs and seeds cost the student only. Asking costs and gives what `judge` does
    alone; where student and teacher read the same, an index of the teacher's vectors can be asked with the student's.

    Shapes: queries [b, width], passages [b n, width], taught [b, 1 + n, width] -> [b]. Cost of a step: that of the judge.

    Raises SmeltError for a judge that is no embedding(), for lists without vectors, and for a teacher of another width.

    Differs from the paper: queries and passages in the place of sentences and their translations.
    """

    paper: ClassVar = Paper(
        "Making Monolingual Sentence Embeddings Multilingual using Knowledge Distillation", "arXiv:2004.09813", "section 2"
    )
    copies: ClassVar[bool] = True
    judge: Any = field(default_factory=Embedding)
    labels: Any = field(default_factory=Embedding)  # what the teacher embeds with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding):
            raise SmeltError(f"vector_mse: judge={self.judge!r} is no embedding(); use vector_mse(judge=embedding())")

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """As embedding(); taught [b, 1 + n, width], zero where a list has no passage."""
        vectors = [one.vectors for one in lists if one.vectors is not None]
        if len(vectors) < len(lists):
            raise SmeltError("vector_mse learns a teacher's vectors; give its stage 'train: {teacher: FOLDER}'")
        return self.judge.collate(lists, model, context) | {"taught": pad_sequence(vectors, batch_first=True)}

    def objective(self, queries: Tensor, passages: Tensor, batch: dict[str, Tensor]) -> Tensor:
        keep, taught = batch["keep"], batch["taught"]
        if queries.shape[1] != taught.shape[2]:
            raise SmeltError(f"vector_mse: vectors of {queries.shape[1]} numbers cannot be those of a teacher with {taught.shape[2]}")
        found = torch.cat([queries[:, None], passages.view(*keep.shape, -1)], 1)
        there = torch.cat([torch.ones_like(keep[:, :1]), keep], 1)
        return ((found - taught).square().sum(-1) * there).sum(1) / there.sum(1)
