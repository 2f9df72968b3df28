"""Texts as vectors: reading them with one model, pooling, comparing by a product, and learning from the others in the batch.

A mask says of every token 0 (padding), 1 (read) or 2 (read and pooled).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smelt.model._load import Loaded, load, locate
from smelt.model._walk import blocks, stack
from smelt.rank import Answer, Asked, Embedder
from smelt.rank._order import sort
from smelt.rank._training import Learns
from smelt.spec import SmeltError

__all__ = [
    "Dense",
    "Row",
    "Towers",
    "around",
    "depth",
    "exits",
    "hidden",
    "in_batch",
    "pad",
    "pooled",
    "relevant",
    "second_model",
    "shortened",
    "until",
]

CHUNK = 1 << 24  # numbers of one block of scores


class Dense(Embedder):
    """Index, search and scores of everything that embeds. A text that comes twice is read once."""

    comparable: ClassVar[bool] = True
    together: ClassVar[bool] = False  # in training: every text is a row of its own

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        asks, which = self._read([a.query for a in asked], model, True)
        found, where = self._read([p for a in asked for p in a.passages], model, False)
        sizes = [len(a.passages) for a in asked]
        which = which.repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        step = max(1, CHUNK // max(1, found.shape[1]))
        parts = [(asks[q] * found[p]).sum(-1) for q, p in zip(which.split(step), where.split(step), strict=True)]
        return list(torch.cat(parts).split(sizes)) if sizes else []

    def index(self, passages: Sequence[str], model: Any) -> Tensor:
        """[passages, width]."""
        found, where = self._read(passages, model, False)
        return found[where]

    def search(self, index: Tensor, queries: Sequence[str], k: int, model: Any) -> list[list[tuple[int, float]]]:
        k = min(k, len(index))
        if k < 1 or not queries:
            return [[] for _ in queries]
        asks, which = self._read(queries, model, True)
        best: list[list[tuple[int, float]]] = []
        for part in asks.split(max(1, CHUNK // len(index))):
            scores = part @ index.T
            lowest = scores.topk(k).values[:, -1:]
            for row, enough in zip(scores, scores >= lowest, strict=True):  # topk breaks ties as it likes
                places = enough.nonzero()[:, 0]
                places = places[torch.argsort(row[places], descending=True, stable=True)][:k]
                best.append(list(zip(places.tolist(), row[places].tolist(), strict=True)))
        return [best[q] for q in which.tolist()]

    def _read(self, texts: Sequence[str], model: Any, query: bool) -> tuple[Tensor, Tensor]:
        """Vectors of the different texts, and which of them each text has."""
        places: dict[str, int] = {}
        which = torch.tensor([places.setdefault(text, len(places)) for text in texts], dtype=torch.long)
        vectors = self.embed(list(places), model, query)
        if not torch.isfinite(vectors).all():
            raise SmeltError(f"{type(self).__name__}: the model's vectors are not finite")
        return vectors, which


class Towers(Dense, Learns):
    """Embedders without parameters of their own, so that others can hold them: what they read with, and what they lose.

    `batch` of every method that holds one is that of `embedding.collate`.
    """

    judge: Any  # field of what holds another: embedding(), or what is held in turn

    def tower(self) -> Any:
        """The `embedding()` that reads."""
        return self.judge.tower()

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        return self.tower().embed(texts, model, query)

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ((queries, passages),) = self.tower().pairs(model, batch)
        return self.objective(queries, passages, batch)

    @abstractmethod
    def objective(self, queries: Tensor, passages: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """[b, d] vectors of the queries, [b * n, d] of the passages -> [b], the loss of each list."""


class Row(NamedTuple):
    ids: list[int]
    first: int  # the tokens that are pooled
    stop: int


def second_model(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Loaded:
    """A second model, kept for the next call: by its folder, as a recipe's names mean other folders in the next seed."""
    return _held(locate(name), dtype, device)


@lru_cache(maxsize=1)
def _held(folder: Path, dtype: torch.dtype, device: str) -> Loaded:
    return load(folder, dtype=dtype, device=device)


def around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and after a text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for at in range(len(full) - len(plain) + 1):
        if full[at : at + len(plain)] == plain:
            return full[:at], full[at + len(plain) :]
    return [], []


def shortened(length: int, context: int, texts: int) -> int:
    """Tokens of each of `texts` texts, so that together they are at most `context` (and one each)."""
    return max(1, min(length, context // max(1, texts)))


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """ids and mask, [rows, longest], int64, on the right."""
    width = max((len(row.ids) for row in rows), default=1)
    ids = torch.tensor([row.ids + [0] * (width - len(row.ids)) for row in rows], dtype=torch.long).view(-1, width)
    ends = torch.tensor([(row.first, row.stop, len(row.ids)) for row in rows], dtype=torch.long).view(-1, 3)
    at = torch.arange(width)
    inside = (at >= ends[:, :1]) & (at < ends[:, 1:2])
    return ids, (at < ends[:, 2:]).long() + inside.long()


def depth(model: Any) -> int:
    return len(blocks(model))


@contextmanager
def until(model: Any, layer: int) -> Iterator[None]:
    """Inside the block the model has its first `layer` layers only; its final norm stays."""
    inner, every = stack(model), blocks(model)
    name = next(name for name, child in inner.named_children() if child is every)
    setattr(inner, name, every[:layer])
    try:
        yield
    finally:
        setattr(inner, name, every)


def hidden(model: Any, ids: Tensor, mask: Tensor, layers: Sequence[int | None] = (None,), both: bool = False) -> list[Tensor]:
    """States [b, t, d] after each of `layers` (1 is the first, None the last), all through the final norm. One forward.

    `model` is the transformers model; nothing above the deepest one is computed. `both`: every token sees every other
    one of its text, in a decoder too: a mask of zeros over real tokens is added in the place of the causal one.
    """
    last = depth(model)
    wanted = [last if layer is None else layer for layer in layers]
    if not 1 <= min(wanted) <= max(wanted) <= last:
        raise SmeltError(f"layer {max(wanted)} of a model of {last} layers cannot be read")
    given: Tensor | None = (mask > 0).long()
    if both:
        lowest = torch.finfo(model.dtype).min
        seen = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device).masked_fill(mask == 0, lowest)
        given = seen[:, None, None, :].expand(-1, 1, mask.shape[1], -1)
    elif model.can_generate():
        given = None  # what comes later is not seen, so padding on the right is not
    top = max(wanted)
    several = any(layer != top for layer in wanted)
    with until(model, top):
        out = model.base_model(input_ids=ids, attention_mask=given, use_cache=False, output_hidden_states=several)
    norm = getattr(stack(model), "norm", None)
    if not several:
        return [out.last_hidden_state] * len(wanted)

    def at(layer: int) -> Tensor:
        return out.hidden_states[layer] if norm is None else norm(out.hidden_states[layer])

    return [out.last_hidden_state if layer == top else at(layer) for layer in wanted]


def pooled(states: Tensor, mask: Tensor, pool: str) -> Tensor:
    """[b, t, d] -> [b, d] float32: the mean, last or first of the tokens with mask 2; of each row at least one."""
    inside = mask > 1
    if pool == "mean":
        inside = inside[..., None].to(torch.float32)
        return (states.float() * inside).sum(1) / inside.sum(1).clamp(min=1)
    at = inside.long().argmax(1) if pool == "first" else mask.shape[1] - 1 - inside.flip(1).long().argmax(1)
    return states[torch.arange(len(states), device=states.device), at].float()


def relevant(grades: Tensor, keep: Tensor) -> Tensor:
    """[b, n] bool: passages graded at least as high as the first of their list, which is a relevant one."""
    return keep & (grades >= grades[:, :1])


def in_batch(queries: Tensor, passages: Tensor, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """InfoNCE: -log softmax_j(<q_i, d_j> / temperature) at the first passage of list i, over those of all lists; [b].

    Not among them: padding, passages of its list graded as high as the first, and the same text in other lists.
    """
    lists, n = batch["keep"].shape
    logits = queries.float() @ passages.float().T / temperature
    own = torch.arange(lists, device=logits.device)
    out = ~batch["keep"].reshape(1, -1).expand(lists, -1)
    out = out | (batch["text"][None, :] == batch["text"].view(lists, n)[:, :1])
    good = torch.zeros(lists, lists, n, dtype=torch.bool, device=logits.device)
    good[own, own] = relevant(batch["grades"], batch["keep"])
    out = (out | good.view(lists, -1)).index_put((own, own * n), torch.tensor(False, device=logits.device))
    return cross_entropy(logits.masked_fill(out, -torch.inf), own * n, reduction="none")


def exits(last: int) -> tuple[int, ...]:
    """A quarter, a half, three quarters and all of the layers, rounded up."""
    return tuple(sorted({-(-last * quarter // 4) for quarter in range(1, 5)}))
