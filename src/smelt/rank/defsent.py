"""Text vectors learned by guessing which entry of a dictionary a definition belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import Dense, relevant, second_model
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["DefSent"]


@dataclass(frozen=True)
class DefSent(Dense, Learns):
    """loss = -log softmax_j(<E_j, e(x)> / tau) at the entry of definition x, E_j = mean over the other definitions of entry j of e_0.

    e_0 is the untrained encoder and E stands still. Here an entry is a list of the data: what its query asks for. Its
    definitions are the query and the passages graded as high as the first; learned are the query and the first
    passage, each of which has to find the list's entry among those of the batch (mean of the two, nats). tau is the
    temperature of the held `judge`.

    `entries` names the model that makes E; without it that is the checkpoint the student came from, read once more. A
    model that never was in a folder makes E as it stands, without gradient. Asked, vectors are normalised: cosines.

    Shapes: E [b, 2, hidden] (for the query, for the first passage), definitions [b, hidden] -> [b]. Cost of a step: one
    forward of the entries' model more than embedding(); asked, that of the held embedding().

    Raises SmeltError for a judge that is no embedding(), and for entries whose width is not the student's.

    Differs from the paper (reconstruction for lists): the softmax runs over the entries of the batch, not over a whole
    dictionary; a definition is left out of the entry it has to find, because with few definitions it would find
    itself (the loss of an untrained tiny model was 2e-6 nats); unit vectors and a temperature, where the paper has
    raw products: judge=embedding(normalize=False, temperature=1.0). Left out: FastICA and standardising of E, which
    need all entries at once, and the progressive rounds; run the stage again with `entries` naming the model of the round before.
    """

    paper: ClassVar = Paper(
        "DefSent+: Improving sentence embeddings by projecting into a dictionary", "arXiv:2405.16153", "entry prediction"
    )
    judge: Any = field(default_factory=Embedding)
    entries: str = ""  # a model source
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding):
            raise SmeltError(f"defsent: judge={self.judge!r} is no embedding(); use defsent(judge=embedding())")

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        return normalize(self.judge.embed(texts, model, query), dim=-1)

    @torch.no_grad()
    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """What embedding() collates, and entries [b, 2, hidden]."""
        batch = self.judge.collate(lists, model, context)
        source = self.entries or (str(model.folder) if model.folder else "")
        frozen = second_model(source).model if source else model.model
        given = {name: value.to(frozen.device) for name, value in batch.items()}
        ((queries, passages),) = self.judge.pairs(frozen, given)
        entries = dictionary(queries.cpu(), passages.cpu(), relevant(batch["grades"], batch["keep"]))
        if (width := model.model.config.get_text_config().hidden_size) != entries.shape[-1]:
            raise SmeltError(f"defsent: entries of '{source}' are {entries.shape[-1]} wide, the student's vectors {width}")
        return batch | {"entries": entries}

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ((queries, passages),) = self.judge.pairs(model, batch)
        first = passages.view(*batch["keep"].shape, -1)[:, 0]
        same = batch["text"].view(batch["keep"].shape)[:, 0]
        entries = batch["entries"] / self.judge.temperature
        return (guessed(queries, entries[:, 0], same) + guessed(first, entries[:, 1], same)) / 2


def dictionary(queries: Tensor, passages: Tensor, good: Tensor) -> Tensor:
    """[b, d], [b n, d], [b, n] -> [b, 2, d]: the mean over a list's relevant passages, and over its query and those but the first."""
    each = passages.view(*good.shape, -1) * good[..., None]
    count = good.sum(1, keepdim=True)
    return torch.stack([each.sum(1) / count, (queries + each[:, 1:].sum(1)) / count], 1)


def guessed(definitions: Tensor, entries: Tensor, same: Tensor) -> Tensor:
    """[b, d] each -> [b]. Entries of other lists with the same first passage (`same` [b]) are left out."""
    logits = definitions @ entries.T
    own = torch.eye(len(same), dtype=torch.bool, device=logits.device)
    twins = (same[:, None] == same[None]) & ~own
    return cross_entropy(logits.masked_fill(twins, -torch.inf), torch.arange(len(same), device=logits.device), reduction="none")
