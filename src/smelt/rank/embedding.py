"""Queries and passages as vectors of one model, compared by a product: what can be indexed once and searched at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn.functional import normalize

from smelt import registry
from smelt.rank._reading import at_once, batches, needs_model, room
from smelt.rank._training import Labelled, read
from smelt.rank._vectors import Row, Towers, around, hidden, in_batch, pad, pooled, second_model, shortened
from smelt.spec import Paper, SmeltError

__all__ = ["Embedding"]

FIRST, AGAIN = "Read this: ", "\nOnce more: "  # before the two copies of an echo


@dataclass(frozen=True)
class Embedding(Towers):
    """score(q, d) = <e(q), e(d)>, e(x) = pool_t h_t(x) / |pool_t h_t(x)|; h are the states after `layer` of the model.

    `pool` is the mean, the last or the first of the text's tokens, special ones included, padding not; or a pooling of the
    family attention, pool=lama(heads=4), whose parameters are trained with the model and kept beside it. Without
    `normalize` vectors keep their length and the score is a raw product. `layer` reads the model's first layers only
    (those above are not computed) and its final norm where it has one. `echo` reads a text twice and pools over the
    second copy, so that a causal model has read all of the text before it pools (arXiv:2402.15449); the copies get the
    same length, half each. `bidirectional` lets a decoder's tokens see those after them; it has to be trained for it.
    `query_model` reads the queries instead, whole and as it is: a small model made to give a large one's vectors
    (vector_mse) reads the passages, which are most of the work, and the large one the query, which is a hundredth of it.
    In training its vectors stand, and only passages are learned. Its tokenizer and its layers are its own, its width is not.

    Encoders and decoders. mean, normalised and 256 tokens long is the recipe of all-MiniLM-L6-v2.

    Trained with InfoNCE at `temperature`: -log softmax over the passages of all lists of the batch, at the first of
    each list; nats. Lists graded by a teacher are used for what is no negative only; margin_mse() learns grades.

    Shapes: n texts -> [n, hidden] float32; what a held pooling makes may be wider. Cost: one forward over the tokens of every
    text, once for texts that come twice; 2 n hidden FLOPs a query; an index of 4 n hidden bytes.

    Raises SmeltError for no model, a query_model of another width, a layer it does not have, a pooling that was not trained
    or is held by another method through this one, and for vectors that are not finite.

    Differs from the paper: there two encoders, of BERT's size, pooled at the first token; here one for both sides, or
    a `query_model` that is not trained. The words around the two copies of an echo are ours. Prefixes count towards `length`.
    """

    paper: ClassVar = Paper(
        "Dense Passage Retrieval for Open-Domain Question Answering", "arXiv:2004.04906", "section 3, in-batch negatives"
    )
    pool: Any = "mean"  # "mean", "last", "first" or a pooling such as lama()
    normalize: bool = True
    layer: Annotated[int, Ge(1)] | None = None  # the deepest that is computed; None is all
    length: Annotated[int, Ge(1)] = 256  # most tokens of a text
    query_prefix: str = ""
    passage_prefix: str = ""
    echo: bool = False
    bidirectional: bool = False
    temperature: Annotated[float, Gt(0)] = 0.05  # in training
    labels: Any = None  # judge or strategy that the teacher grades lists with
    query_model: str | None = None  # a folder or a hub id: what reads the queries; None: the model that reads the passages
    weights: Any = None  # folder of a trained pooling, where it is not the model's; not read without one

    def __post_init__(self) -> None:
        if self.pool in ("mean", "last", "first"):
            return
        made = getattr(self.pool, "module", None)
        if not callable(made) or isinstance(made, type):
            raise SmeltError(f"embedding: pool={self.pool!r} pools nothing; write 'mean', 'last', 'first' or a pooling such as lama()")

    def tower(self) -> Embedding:
        return self

    def heads(self, config: Any) -> nn.Module | None:
        return None if isinstance(self.pool, str) else self.pool.module(config.hidden_size)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        return self.layers(texts, model, query, (self.layer,))[:, 0]

    @torch.no_grad()
    def layers(self, texts: Sequence[str], model: Any, query: bool, layers: Sequence[int | None]) -> Tensor:
        """[texts, layers, hidden] float32 on CPU: the vectors after each of the layers. Texts of near lengths are read together."""
        needs_model(model, "embedding")
        if query and self.query_model is not None:
            alone, other = self.asking(model.model)
            return alone.layers(texts, other, True, (None,)).expand(-1, len(layers), -1)
        rows, heads = self.rows(texts, model, query), read(self, model)
        width = model.model.config.get_text_config().hidden_size
        if heads is not None:
            one = torch.ones(1, 1, width, device=model.model.device)
            width = heads(one, one[..., 0] > 0).shape[1]
        found = torch.empty(len(rows), len(layers), width)
        for batch in batches([len(row.ids) for row in rows], at_once(model)):
            ids, mask = (x.to(model.model.device) for x in pad([rows[r] for r in batch]))
            found[batch] = torch.stack(self.vectors(model.model, ids, mask, layers, heads), 1).cpu()
        return found

    def asking(self, model: Any) -> tuple[Embedding, Any]:
        """What reads the queries beside the transformers model `model`, and the Loaded that it reads them with."""
        other = second_model(str(self.query_model), model.dtype, str(model.device))
        mine, theirs = (m.config.get_text_config().hidden_size for m in (model, other.model))
        if isinstance(self.pool, str) and mine != theirs:
            raise SmeltError(f"embedding: query_model='{self.query_model}' makes vectors of {theirs} numbers, the model of {mine}")
        return replace(self, query_model=None, layer=None, weights=None), other

    def rows(self, texts: Sequence[str], model: Any, query: bool = False, length: int | None = None) -> list[Row]:
        """Ids of each text, cut to `length`, and which of them are pooled."""
        if not texts:
            return []
        tokenizer, most = model.tokenizer, min(self.length if length is None else length, room(model))
        before, after = around(tokenizer)
        prefix = self.query_prefix if query else self.passage_prefix

        def encode(some: Sequence[str]) -> list[list[int]]:
            return tokenizer(list(some), add_special_tokens=False, verbose=False)["input_ids"]

        if not self.echo:
            left = max(0, most - len(before) - len(after))
            made = [before + ids[:left] + after for ids in encode([prefix + text for text in texts])]
            made = [ids[:most] or [tokenizer.eos_token_id or tokenizer.bos_token_id or 0] for ids in made]
            return [Row(ids, 0, len(ids)) for ids in made]
        first, again = encode([prefix + FIRST, AGAIN])
        left = max(1, (most - len(before) - len(after) - len(first) - len(again)) // 2)
        found = []
        for ids in encode(texts):
            head = before + first + ids[:left] + again
            row = head + ids[:left]
            if len(row) + len(after) > room(model):
                raise SmeltError(f"embedding(echo=True): a text twice and the words around it need more than {room(model)} tokens")
            found.append(Row(row + after, len(head), len(row)) if ids else Row(head + after, 0, len(head)))
        return found

    def vectors(self, model: Any, ids: Tensor, mask: Tensor, layers: Sequence[int | None] | None = None, heads: Any = None) -> list[Tensor]:
        """[b, t] ids and mask -> of each layer [b, hidden] float32. `model` is the transformers model, `heads` the pooling's module."""
        if heads is None and not isinstance(self.pool, str):
            raise SmeltError(f"rank: what holds embedding(pool={registry.text(self.pool)}) trains no pooling; leave `pool` out of it")
        states = hidden(model, ids, mask, (self.layer,) if layers is None else layers, self.bidirectional)
        found = [pooled(s, mask, self.pool) if heads is None else heads(s, mask > 1) for s in states]
        return [normalize(v, dim=-1) for v in found] if self.normalize else found

    def pairs(
        self, model: Any, batch: dict[str, Tensor], layers: Sequence[int | None] | None = None, heads: Any = None
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each layer the vectors of a batch: queries [b, hidden], passages [b * n, hidden]."""
        passages = self.vectors(model, batch["passage_ids"], batch["passage_mask"], layers, heads)
        if self.query_model is None:
            queries = self.vectors(model, batch["query_ids"], batch["query_mask"], layers, heads)
        else:
            alone, other = self.asking(model)
            with torch.no_grad():
                queries = len(passages) * alone.vectors(other.model, batch["query_ids"], batch["query_mask"], None, read(alone, other))
        return list(zip(queries, passages, strict=True))

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """query_ids, query_mask [b, t]; passage_ids, passage_mask [b n, s]; text [b n], equal for equal texts; keep, grades [b, n].

        n is the longest list's; shorter ones are filled with a passage of one token that `keep` leaves out.
        """
        n = max(len(one.passages) for one in lists)
        most = shortened(self.length, context, 1 + n)
        texts = [p for one in lists for p in [*one.passages, *[""] * (n - len(one.passages))]]
        keep = torch.tensor([[at < len(one.passages) for at in range(n)] for one in lists])
        rows = self.rows(texts, model, length=most)
        rows = [row if kept else Row(row.ids[:1], 0, 1) for row, kept in zip(rows, keep.flatten().tolist(), strict=True)]
        alone, asked = (self, model) if self.query_model is None else self.asking(model.model)
        query_ids, query_mask = pad(alone.rows([one.query for one in lists], asked, True, most))
        passage_ids, passage_mask = pad(rows)
        known: dict[str, int] = {}
        return {
            "query_ids": query_ids,
            "query_mask": query_mask,
            "passage_ids": passage_ids,
            "passage_mask": passage_mask,
            "text": torch.tensor([known.setdefault(text, len(known)) for text in texts]),
            "keep": keep,
            "grades": torch.tensor([[*map(float, one.grades), *[0.0] * (n - len(one.passages))] for one in lists]),
        }

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ((queries, passages),) = self.pairs(model, batch, heads=heads)
        return self.objective(queries, passages, batch)

    def objective(self, queries: Tensor, passages: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return in_batch(queries, passages, batch, self.temperature)
