"""One decoder that embeds and generates; how likely it makes a passage teaches how near it puts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, softplus

from smelt.rank._reading import needs_decoder, room
from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import Dense, Row, around, pad, shortened
from smelt.rank.embedding import Embedding
from smelt.spec import Paper, SmeltError

__all__ = ["ULLME"]


@dataclass(frozen=True)
class ULLME(Dense, Learns):
    """loss = L_CL + generation L_gen + agreement KL(softmax_j mean log p(d_j | q) || softmax_j cos(q, d_j) / tau).

    L_CL: the held embedding()'s InfoNCE. L_gen: the model writes passages after the query, causally; `generate="sft"`
    is the mean negative log-likelihood of the first passage's tokens, `"dpo"` -log sigmoid(beta (log p(d_0 | q) -
    log p(d_j | q))), mean over j, without a reference. KL: over the passages of a list, tau its temperature; no
    gradient reaches the generative side through it. Embeddings are read with attention in both directions.

    Asked, it is its judge: cost and scores of embedding(bidirectional=True). A training step adds n causal readings of
    query and passage per list with their logits (of the first passage with gradient for sft, of all for dpo). Nats.
    Shapes: likelihoods and cosines [b, n], keep [b, n] bool -> [b].

    Raises SmeltError for a model that is no decoder and for a judge that is no embedding().

    Differs from the paper: its released trainer measures distance on unit vectors by default, here cosine; it asks for
    a preference loss where the KL is on, here likelihoods of negatives are read without gradient for sft. No GradCache:
    `keep` lists per batch as memory allows. Half of a list's tokens go to either part.
    """

    paper: ClassVar = Paper("ULLME: A Unified Framework for Large Language Model Embeddings", "arXiv:2408.03402", "GRL")
    judge: Any = field(default_factory=lambda: Embedding(bidirectional=True))
    generate: Literal["sft", "dpo"] = "sft"
    generation: Annotated[float, Ge(0)] = 1.0  # weight of L_gen
    agreement: Annotated[float, Ge(0)] = 1.0  # weight of the KL
    beta: Annotated[float, Gt(0)] = 0.1
    bridge: str = "\n"  # between query and passage when one is written after the other
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: there are no parameters beside the model's

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding):
            raise SmeltError(f"ullme: judge={self.judge!r} is no embedding(); use ullme(judge=embedding(bidirectional=True))")

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        needs_decoder(model, "ullme")
        return self.judge.embed(texts, model, query)

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """What embedding() collates, and pair_ids, pair_mask [b n, t]: query and passage, mask 2 where the passage is written."""
        needs_decoder(model, "ullme")
        batch = self.judge.collate(lists, model, context // 2)
        tokenizer, n = model.tokenizer, batch["keep"].shape[1]
        most = max(4, min(shortened(2 * self.judge.length, context // 2, n), room(model)))

        def plain(texts: Sequence[str]) -> list[list[int]]:
            return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

        start = around(tokenizer)[0] or [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1] or [0]
        asks, between = plain([one.query for one in lists]), plain([self.bridge])[0]
        rows = []
        for ask, one in zip(asks, lists, strict=True):
            head = (start + ask[: most // 3] + between)[: most - 1]
            for passage in plain(one.passages):
                ids = head + passage[: most - len(head)]
                rows.append(Row(ids, len(head), len(ids)))
            rows += [Row(head[:1], 1, 1)] * (n - len(one.passages))
        batch["pair_ids"], batch["pair_mask"] = pad(rows)
        return batch

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ((queries, passages),) = self.judge.pairs(model, batch)
        loss = self.judge.objective(queries, passages, batch)
        if not self.generation and not self.agreement:
            return loss
        keep = batch["keep"]
        total, count = self._written(model, batch["pair_ids"], batch["pair_mask"], keep)
        mean = total / count.clamp(min=1)
        if self.generation:
            loss = loss + self.generation * (-mean[:, 0] if self.generate == "sft" else preferred(total, keep, self.beta))
        if self.agreement:
            near = normalize(queries, dim=-1)[:, None] * normalize(passages, dim=-1).view(*keep.shape, -1)
            loss = loss + self.agreement * agreed(mean.detach(), near.sum(-1) / self.judge.temperature, keep)
        return loss

    def _written(self, model: Any, ids: Tensor, mask: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """[b, n] log-likelihoods of the passages in nats, and their tokens. For sft only the first has a gradient."""
        first = torch.zeros_like(keep)
        first[:, 0] = True
        parts = [first, ~first] if self.generate == "sft" and keep.shape[1] > 1 else [torch.ones_like(keep)]
        if not self.agreement and self.generate == "sft":
            parts = parts[:1]
        total = torch.zeros(keep.shape, device=ids.device)
        for at, part in enumerate(parts):
            rows = part.flatten()
            with torch.set_grad_enabled(torch.is_grad_enabled() and at == 0):
                found = likelihoods(model(input_ids=ids[rows], use_cache=False).logits, ids[rows], mask[rows])
            total = total.masked_scatter(part, found)  # outside of the block, which would cut the first part off
        return total, (mask[:, 1:] > 1).sum(-1).view(keep.shape)


def likelihoods(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """[b, t, v], [b, t] -> [b] float32: sum of log p of the tokens with mask 2 that have one before them."""
    said = -cross_entropy(logits[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none")
    return torch.where(mask[:, 1:] > 1, said, 0.0).sum(-1)


def preferred(total: Tensor, keep: Tensor, beta: float) -> Tensor:
    """[b, n] log-likelihoods -> [b]: -log sigmoid(beta (first - other)), mean over the others; 0 where there is none."""
    each = softplus(-beta * (total[:, :1] - total[:, 1:])) * keep[:, 1:]
    return each.sum(-1) / keep[:, 1:].sum(-1).clamp(min=1)


def agreed(mean: Tensor, near: Tensor, keep: Tensor) -> Tensor:
    """[b, n] each -> [b]: KL(softmax(mean) || softmax(near)) over the kept ones."""
    p, q = (x.masked_fill(~keep, -torch.inf).log_softmax(-1).masked_fill(~keep, 0.0) for x in (mean, near))
    return (p.exp() * (p - q) * keep).sum(-1)
