"""Texts as sparse vectors over the vocabulary, which a language model's own logits fill: dense reading, an inverted index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from smelt.rank import Answer, Asked, Retriever
from smelt.rank._order import sort
from smelt.rank._reading import at_once, batches, needs_model
from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import hidden, in_batch, pad
from smelt.rank.embedding import Embedding
from smelt.rank.margin_mse import margins
from smelt.spec import Paper, SmeltError

__all__ = ["MistralSplade"]

LOGITS = 1 << 27  # numbers of one block of them


@dataclass(frozen=True)
class MistralSplade(Retriever, Learns):
    """score(q, d) = sum_j w_j(q) w_j(d), w_j(x) = max_t log(1 + relu(z_tj)), z_t = E h_t, E the input embedding [vocabulary, hidden].

    h are the final states at the tokens that the held embedding() pools: with echo those of a text's second copy, so
    that a causal model has read all of the text; `pool="sum"` is SPLADE's first form. Special tokens weigh 0.
    `query_terms` and `passage_terms` keep the largest weights only. Decoders and encoders; of the embedding() only what
    it reads counts (echo, length, prefixes, layer, bidirectional), not its pool, norm and temperature.

    loss_i = rank_i + r (query_weight R(queries) + passage_weight R(passages)), r = min(1, seen / ramp)^2 for `seen` lists
    before this batch. R is flops: sum_j (mean_b w_bj)^2, or l1: mean_b sum_j w_bj. rank_i is the softmax over the
    passages of all lists, without a temperature, or margin-MSE on the grades (`objective="margin"`; then weights of
    0.5 and 0.4 are the authors'). The two weights depend on the vocabulary, the batch and the unit of the loss. `seen`
    is a buffer of the heads: it advances in training mode only, is in every checkpoint and is not read in judging.

    Shapes: [texts, vocabulary] float32 in training, an index of 16 bytes per weight that is not 0. Cost: a forward, and 2 hidden
    vocabulary FLOPs per pooled token; a query adds up the lists of its terms. Scores float64, of any window comparable.

    Raises SmeltError for no model, for embeddings not as wide as the states, and for weights that are not finite.
    Differs from the paper: trained whole, without LoRA (give the adapter's merged model to start from one); which
    regulariser it used is not established (reconstruction: FLOPS for both). A soft cap or scale of logits is not applied.
    """

    paper: ClassVar = Paper(
        "Mistral-SPLADE: LLMs for better Learned Sparse Retrieval", "arXiv:2408.11119", "SPLADE: arXiv:2109.10086; echo: arXiv:2402.15449"
    )
    comparable: ClassVar[bool] = True
    together: ClassVar[bool] = False
    judge: Any = field(default_factory=lambda: Embedding(echo=True))
    pool: Literal["max", "sum"] = "max"
    query_terms: Annotated[int, Ge(1)] | None = None  # most weights kept; None is all
    passage_terms: Annotated[int, Ge(1)] | None = None
    objective: Literal["softmax", "margin"] = "softmax"
    scale: Annotated[float, Gt(0)] = 1.0  # of the grades, for "margin"
    query_sparsity: Literal["flops", "l1"] = "flops"
    passage_sparsity: Literal["flops", "l1"] = "flops"
    query_weight: Annotated[float, Ge(0)] = 3e-4
    passage_weight: Annotated[float, Ge(0)] = 1e-4
    ramp: Annotated[int, Ge(0)] = 1000  # lists; the authors' 50,000 of 150,000 steps are a third of their training
    labels: Any = None  # judge or strategy that the teacher grades lists with
    weights: Any = None  # not read: the heads only count, and only in training

    def __post_init__(self) -> None:
        if not isinstance(self.judge, Embedding):
            raise SmeltError(f"mistral_splade: judge={self.judge!r} is no embedding(); use mistral_splade(judge=embedding(echo=True))")
        if self.judge.query_model is not None:
            raise SmeltError("mistral_splade reads the query itself; leave query_model out of its embedding()")

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        places: dict[str, int] = {}
        which = [[places.setdefault(p, len(places)) for p in a.passages] for a in asked]
        index, queries = self.index(list(places), model), self._read([a.query for a in asked], model, True)
        return [torch.from_numpy(index.scores(*query)[own]) for query, own in zip(queries, which, strict=True)]

    def index(self, passages: Sequence[str], model: Any) -> Postings:
        return Postings.of(self._read(passages, model, False))

    def search(self, index: Postings, queries: Sequence[str], k: int, model: Any) -> list[list[tuple[int, float]]]:
        best = []
        for query in self._read(queries if index.texts and k > 0 else (), model, True):
            scores = index.scores(*query)
            best.append([(int(i), float(scores[i])) for i in np.argsort(-scores, kind="stable")[:k]])
        return best or [[] for _ in queries]

    @torch.no_grad()
    def _read(self, texts: Sequence[str], model: Any, query: bool) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each text its terms, rising, and their weights."""
        needs_model(model, "mistral_splade")
        rows, most = self.judge.rows(texts, model, query), self.query_terms if query else self.passage_terms
        found: list[Any] = [None] * len(rows)
        special, device = torch.tensor(model.tokenizer.all_special_ids, dtype=torch.long), model.model.device
        budget = min(at_once(model), max(1, LOGITS // model.model.get_input_embeddings().weight.shape[0]))
        for batch in batches([len(row.ids) for row in rows], budget):
            ids, mask = (x.to(device) for x in pad([rows[r] for r in batch]))
            weights = self.terms(model.model, ids, mask, special.to(device)).cpu()
            if not torch.isfinite(weights).all():
                raise SmeltError("mistral_splade: the model's weights of terms are not finite")
            for r, row in zip(batch, weights, strict=True):
                kept = row.nonzero()[:, 0]
                if most is not None and len(kept) > most:
                    kept = kept[torch.argsort(row[kept], descending=True, stable=True)[:most]].sort().values
                found[r] = kept.numpy(), row[kept].double().numpy()
        return found

    def terms(self, model: Any, ids: Tensor, mask: Tensor, special: Tensor) -> Tensor:
        """[b, t] ids and mask, [s] ids without weight -> [b, vocabulary] float32, at least 0. `model` is the transformers model."""
        table = model.get_input_embeddings().weight
        (states,) = hidden(model, ids, mask, (self.judge.layer,), self.judge.bidirectional)
        if states.shape[-1] != table.shape[1]:
            raise SmeltError(f"mistral_splade: states are {states.shape[-1]} wide and embeddings {table.shape[1]}; they must be the same")
        inside = mask > 1  # without a gap in any row; only these places get logits
        size = inside.sum(1, keepdim=True)
        at = torch.arange(int(size.max()), device=ids.device)
        real, at = at < size, (inside.long().argmax(1, keepdim=True) + at).clamp(max=mask.shape[1] - 1)
        logits = states.gather(1, at[..., None].expand(-1, -1, states.shape[-1])) @ table.T
        return weighed(logits, real, self.pool).index_fill(1, special, 0.0)

    def heads(self, config: Any) -> Seen:
        return Seen()

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """What embedding() collates, and special [b, s], the ids of special tokens."""
        return self.judge.collate(lists, model, context) | {
            "special": torch.tensor(model.tokenizer.all_special_ids, dtype=torch.long).expand(len(lists), -1).contiguous()
        }

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        keep, special = batch["keep"], batch["special"][0]
        queries, passages = (self.terms(model, batch[f"{side}_ids"], batch[f"{side}_mask"], special) for side in ("query", "passage"))
        if self.objective == "softmax":
            ranked = in_batch(queries, passages, batch, 1.0)
        else:
            ranked = margins((queries[:, None] * passages.view(*keep.shape, -1)).sum(-1), self.scale * batch["grades"], keep)
        sparse = self.query_weight * dense(queries, self.query_sparsity)
        sparse = sparse + self.passage_weight * dense(passages[keep.flatten()], self.passage_sparsity)
        return ranked + heads(len(keep), self.ramp) * sparse


class Seen(nn.Module):
    """How many lists were learned from: `loss` is told no progress, so it is counted here."""

    lists: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("lists", torch.zeros((), dtype=torch.float64))

    def forward(self, lists: int, ramp: int) -> Tensor:
        before = self.lists.clone() if ramp else torch.ones_like(self.lists)
        if self.training:
            self.lists += lists
        return (before / max(1, ramp)).clamp(max=1.0).square().float()


class Postings(NamedTuple):
    """Of each term the texts that have it, rising, and its weight in them."""

    texts: int
    starts: np.ndarray  # where a term's list begins; one more than the largest term has
    places: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, found: Sequence[tuple[np.ndarray, np.ndarray]]) -> Postings:
        terms, weights = (np.concatenate([np.zeros(0, kind), *(f[i] for f in found)]) for i, kind in enumerate((np.int64, np.float64)))
        places = np.repeat(np.arange(len(found)), [len(t) for t, _ in found])
        order = np.argsort(terms, kind="stable")
        starts = np.concatenate([[0], np.cumsum(np.bincount(terms, minlength=1))])
        return cls(len(found), starts, places[order], weights[order])

    def scores(self, terms: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """[texts] float64, the product with every text."""
        known = terms < len(self.starts) - 1
        first = self.starts[terms[known]]
        size = self.starts[terms[known] + 1] - first
        at = np.arange(size.sum()) + np.repeat(first - np.cumsum(size) + size, size)
        return np.bincount(self.places[at], self.weights[at] * np.repeat(weights[known], size), minlength=self.texts)


def weighed(logits: Tensor, real: Tensor, pool: str) -> Tensor:
    """[b, t, v] logits, [b, t] bool -> [b, v] float32. The logarithm is monotone, so the maximum is taken before it."""
    if pool == "sum":
        return (logits.float().relu().log1p() * real[..., None]).sum(1)
    return logits.masked_fill(~real[..., None], -torch.inf).amax(1).float().relu().log1p()


def dense(weights: Tensor, kind: str) -> Tensor:
    """[n, v] weights >= 0 -> a number: sum_j (mean_b w_bj)^2, or mean_b sum_j w_bj."""
    mean = weights.float().mean(0)
    return mean.square().sum() if kind == "flops" else mean.sum()
