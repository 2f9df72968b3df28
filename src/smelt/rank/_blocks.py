"""Passages read side by side: each sees what stands before all of them and itself; what stands after them sees everything.

`blocks` lays one question out, `mask` is the attention of a batch of them as one dense matrix: slow, any model, differentiable.
`read` computes the same with plain caches: the prefix once, the parts as rows that go on from it, the tail over all
of them. For n parts of L tokens, a prefix of A and a tail of D tokens (attention pairs of one head and layer):

           one causal row        `mask`            `read`
    pairs  (A + nL + D)^2 / 2    (A + nL + D)^2    A^2 + nL(A + L) + D(A + nL + D), linear in n
    bytes  of the mask, float    4 (A + nL + D)^2  4 rows x L(A + L), with as many rows as `tokens` allows
    cache  none is needed        none              2 x layers x kv width x (A + nL), and the prefix once per row read

The context bounds A + L + D, not the number of parts: their positions all begin at A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from smelt.rank._prompt import chat, clean, encode
from smelt.rank._reading import at_once, batches, room
from smelt.spec import SmeltError

__all__ = ["MARK", "PAD", "TAIL", "Blocks", "Read", "blocks", "compose", "mask", "reach", "read", "stack"]

PREFIX, TAIL, PAD = 0, -1, -2  # segments; the parts are 1, 2, ...
MARK = "\x00"  # in a request: where the query, the passages and the query again will stand
HELD = 1 << 15  # tokens whose keys and values are held at a time


class Blocks(NamedTuple):
    ids: Tensor  # [t]
    positions: Tensor  # [t]
    segment: Tensor  # [t]: PREFIX, 1..n, TAIL


class Read(NamedTuple):
    """Some of the questions, after their tails were read. w: tokens of the longest one before its tail; padding is PAD."""

    which: list[int]
    output: Any  # the model's over the tails, [b, d, ...] padded on the right; with `logits`: [b, vocab] after their last tokens
    segment: Tensor  # [b, w]
    hidden: Tensor  # [b, w, width] last hidden states


class _Row(NamedTuple):
    ids: Tensor
    positions: Tensor
    sees: Tensor  # places in the pool


class _Pool:
    """Keys, values and last hidden states of tokens that were read, one row per token."""

    def __init__(self, device: Any) -> None:
        self.layers: list[tuple[Tensor, Tensor]] = []  # [tokens, kv heads, d]
        self.hidden = torch.empty(0, device=device)
        self.size = 0


def blocks(prefix: Sequence[int], parts: Sequence[Sequence[int]], tail: Sequence[int], *, tail_at: int | None = None) -> Blocks:
    """Positions of every part begin at |prefix|; those of the tail at |prefix| + the longest part, or at `tail_at`."""
    if not prefix or not tail or not all(parts):
        raise SmeltError("the prefix, the tail and every part need at least one token")
    longest = len(prefix) + max(map(len, parts), default=0)
    if tail_at is not None and tail_at < longest:
        raise SmeltError(f"the tail cannot begin at position {tail_at}: the longest part ends at {longest}")
    rows = [prefix, *parts, tail]
    starts = [0] + [len(prefix)] * len(parts) + [longest if tail_at is None else tail_at]
    return Blocks(
        torch.tensor([i for row in rows for i in row]),
        torch.cat([torch.arange(len(row)) + start for row, start in zip(rows, starts, strict=True)]),
        torch.repeat_interleave(torch.tensor([*range(len(parts) + 1), TAIL]), torch.tensor([len(row) for row in rows])),
    )


def stack(asked: Sequence[Blocks]) -> Blocks:
    """One batch [b, t], padded on the right."""
    ids, positions, segment = zip(*asked, strict=True)
    pads = zip((ids, positions, segment), (0, 0, PAD), strict=True)
    return Blocks(*(pad_sequence(list(column), batch_first=True, padding_value=value) for column, value in pads))


def mask(segment: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[b, t] -> additive [b, 1, t, t]. Float: eager attention reads a boolean one wrong. A pad sees itself, or it had nothing to see."""
    row, column = segment[:, :, None], segment[:, None, :]
    sees = ((row == TAIL) | (column == PREFIX) | (row == column)) & (column != PAD)
    size = segment.shape[1]
    sees = (sees & torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()) | torch.eye(
        size, dtype=torch.bool, device=segment.device
    )
    return _additive(sees, dtype)[:, None]


def _additive(sees: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill(~sees, torch.finfo(dtype).min)


def reach(model: Any) -> int:
    """Positions within which every token sees every other: the context, or the model's own window where that is smaller."""
    return min(room(model), getattr(model.model.config.get_text_config(), "sliding_window", None) or room(model))


def compose(
    model: Any,
    request: str,
    query: str,
    parts: Sequence[tuple[str, ...]],  # what opens a passage, the passage, and what closes it, in pieces tokenized apart
    ending: str,
    *,
    after: Sequence[int] = (),  # ids that follow the ending
    length: int,
    tail_at: int | None = None,
    total: int | None = None,
) -> Blocks:
    """A request with three MARKs, laid out. Passages are cut to `length` tokens, the query to a quarter of what is left
    for texts, both further where the context or `total` (tokens in all, about) asks for it. Raises SmeltError where
    not one token of a passage fits."""
    tokenizer, template, limit = model.tokenizer, chat(model.tokenizer), reach(model)

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return list(tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]) if texts else []

    pieces = (request + "\n" if template is None else template(request)).split(MARK)
    start = encode(tokenizer, pieces[0], template is not None)
    between, before, end, question = ids([pieces[1], pieces[2], pieces[3] + ending, clean(query, limit)])
    opened, texts = ids([p[0] for p in parts]), ids([clean(p[1], length) for p in parts])
    closed = [[i for piece in pieces for i in piece] for pieces in zip(*(ids(column) for column in list(zip(*parts))[2:]), strict=True)]
    head, foot = len(start) + len(between), len(before) + len(end) + len(after)
    frames = [len(o) + len(c) for o, c in zip(opened, closed, strict=True)]
    front = limit - head - foot if tail_at is None else tail_at - head  # for the query (twice, without tail_at) and one part
    front -= max(frames, default=0)
    asks = min(len(question), max(0, front // 4 if tail_at is None else min(front // 2, limit - tail_at - foot)))
    if total is not None:
        asks = min(asks, max(1, total // 8))
    left = front - (2 if tail_at is None else 1) * asks
    if left < 1 or (tail_at is not None and limit - tail_at < foot + asks):
        raise SmeltError(
            f"{len(parts)} passages and the query find no room: what stands around them takes "
            f"{head + foot + max(frames, default=0)} of the {limit} positions the model reads; take a smaller window"
        )
    if total is not None:
        left = min(left, max(1, (total - head - foot - 2 * asks - sum(frames)) // max(1, len(parts))))
    cut = question[:asks]
    body = [o + t[: min(length, left)] + c for o, t, c in zip(opened, texts, closed, strict=True)]
    return blocks(start + cut + between, body, before + cut + end + list(after), tail_at=tail_at)


@torch.no_grad()
def read(model: Any, asked: Sequence[Blocks], *, logits: bool = False, tails: bool = True, tokens: int | None = None) -> Iterator[Read]:
    """Every question once, in batches. `logits` runs the language head after each tail's last token; without `tails`
    the output is None. Equal to the model under `mask`; a call reads `tokens` tokens at most (`at_once`), what they see counted."""
    base, device, tokens = model.model.base_model, model.model.device, tokens or at_once(model)
    for group in batches([len(one.ids) for one in asked], HELD):
        pool, rows = _Pool(device), [_split(asked[i]) for i in group]
        prefixes = _extend(base, pool, [_Row(*row[0], torch.empty(0, dtype=torch.long)) for row in rows], tokens)
        owner = [at for at, row in enumerate(rows) for _ in row[1:-1]]
        parts = _extend(base, pool, [_Row(*part, prefixes[at]) for at, row in enumerate(rows) for part in row[1:-1]], tokens)
        sees = [torch.cat([p, *(s for s, o in zip(parts, owner, strict=True) if o == at)]) for at, p in enumerate(prefixes)]
        ends = [_Row(*row[-1], s) for row, s in zip(rows, sees, strict=True)]
        for batch in batches([len(r.ids) + len(r.sees) for r in ends], tokens):
            taken = [ends[at] for at in batch]
            output = None
            if tails:
                output, _, _ = _step(model.model if logits else base, pool, taken, logits)
            slots = pad_sequence([r.sees for r in taken], batch_first=True, padding_value=-1)
            segment = pad_sequence([asked[group[at]].segment[: len(ends[at].sees)] for at in batch], batch_first=True, padding_value=PAD)
            yield Read([group[at] for at in batch], output, segment.to(device), pool.hidden[slots.clamp(min=0).to(device)])


def _split(one: Blocks) -> list[tuple[Tensor, Tensor]]:
    sizes = torch.unique_consecutive(one.segment, return_counts=True)[1].tolist()
    return list(zip(one.ids.split(sizes), one.positions.split(sizes), strict=True))


def _extend(base: Any, pool: _Pool, rows: list[_Row], tokens: int) -> list[Tensor]:
    """Reads the rows and adds their tokens to the pool; of each row its places there."""
    places: list[Tensor] = [torch.empty(0)] * len(rows)
    made: list[list[tuple[Tensor, Tensor]]] = []
    hidden: list[Tensor] = []
    for batch in batches([len(r.ids) + len(r.sees) for r in rows], tokens):
        output, cache, valid = _step(base, pool, [rows[i] for i in batch], False)
        new = [(layer.keys[:, :, -valid.shape[1] :], layer.values[:, :, -valid.shape[1] :]) for layer in cache.layers]
        made.append([(k.transpose(1, 2)[valid], v.transpose(1, 2)[valid]) for k, v in new])
        hidden.append(output.last_hidden_state[valid])
        for i in batch:
            places[i] = torch.arange(pool.size, pool.size + len(rows[i].ids))
            pool.size += len(rows[i].ids)
    if made:
        old = [[layer] for layer in pool.layers] or [[] for _ in made[0]]
        columns = [o + [m[i] for m in made] for i, o in enumerate(old)]
        pool.layers = [(torch.cat([k for k, _ in column]), torch.cat([v for _, v in column])) for column in columns]
        pool.hidden = torch.cat([pool.hidden.to(hidden[0].dtype).reshape(-1, hidden[0].shape[-1]), *hidden])
    return places


def _step(module: Any, pool: _Pool, rows: list[_Row], logits: bool) -> tuple[Any, Any, Tensor]:
    """One forward: each row goes on from the tokens of the pool that it sees. (output or [b, vocab], cache, which ids are no pads)"""
    device = pool.hidden.device
    ids, positions = (pad_sequence([r[i] for r in rows], batch_first=True).to(device) for i in (0, 1))
    slots = pad_sequence([r.sees for r in rows], batch_first=True, padding_value=-1).to(device)
    last = torch.tensor([len(r.ids) - 1 for r in rows], device=device)
    cache, size = DynamicCache(), ids.shape[1]
    if slots.shape[1]:
        for i, (keys, values) in enumerate(pool.layers):
            cache.update(keys[slots.clamp(min=0)].transpose(1, 2), values[slots.clamp(min=0)].transpose(1, 2), i)
    there = (slots >= 0)[:1] if bool((slots >= 0).all()) else slots >= 0  # one mask for all rows that see equally many
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    sees = torch.cat([there[:, None].expand(-1, size, -1), causal.expand(len(there), -1, -1)], -1)
    options: dict[str, Any] = {"attention_mask": _additive(sees, module.dtype)[:, None], "past_key_values": cache, "use_cache": True}
    if logits:
        ends = last.unique()  # sorted
        output = module(input_ids=ids, position_ids=positions, logits_to_keep=ends, **options).logits
        output = output[torch.arange(len(rows), device=device), torch.searchsorted(ends, last)]
    else:
        output = module(input_ids=ids, position_ids=positions, **options)
    return output, cache, torch.arange(size, device=device) <= last[:, None]
