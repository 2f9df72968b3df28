"""Answers written side by side, each at its own place: a row leaves the batch when its answer is over, and one that waits joins it
at the next token. Nobody waits for the longest answer of those that came before.

The texts are padded on the left, out of sight of the mask, and every row counts its own positions, so a row that joins
changes no other. What it costs the others is the time of its prompt.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from smelt.decode._loop import FREE

__all__ = ["Rule", "fly", "rule"]


Rule = tuple[list[Any], bool]  # how tokens are chosen: logits processors, and whether they are drawn


class Answer(Protocol):
    ids: list[int]  # of the prompt
    choice: Any  # which rule
    over: bool

    def put(self, token: int, ends: frozenset[int]) -> None: ...


def rule(model: Any, options: dict[str, Any]) -> Rule | None:
    """How `generate` would choose with these options; None where rows of a batch could not come and go: a processor looks at
    the text (and so at the padding), or the model takes no positions."""
    if not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        return None
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    made = model.generate(ids, attention_mask=ids + 1, custom_generate=_processors, pad_token_id=0, max_new_tokens=1, **options)
    return (made, bool(options["do_sample"])) if all(isinstance(p, FREE) for p in made) else None


def _processors(model: Any, input_ids: Tensor, logits_processor: Any = None, **kwargs: Any) -> list[Any]:
    return list(logits_processor or [])


@torch.no_grad()
def fly(
    model: Any,
    answers: Sequence[Answer],
    rules: Callable[[Any], Rule],
    ends: frozenset[int],
    join: Callable[[int], Sequence[Answer]],
) -> None:
    """Write until every answer is over. `rules(choice)` says how its tokens are chosen; `join(n)` gives those that shall be written
    beside the n that are left."""
    rows = _Rows(model, rules, ends)
    rows.add(answers)
    while rows.answers:
        rows.step()
        if rows.plain and (more := join(len(rows.answers))):
            rows.add(more)


class _Rows:
    """`mask` [b, n] of the tokens in the cache; `last` [b] the tokens chosen and not read yet."""

    def __init__(self, model: Any, rules: Callable[[Any], Rule], ends: frozenset[int]):
        self.model, self.rules, self.ends = model, rules, ends
        self.answers: list[Answer] = []
        self.cache: Any = None
        self.mask = self.last = torch.empty(0)
        self.plain = True  # a cache whose rows may be padded: not a window, not a state

    def add(self, answers: Sequence[Answer]) -> None:
        length, device = max(len(a.ids) for a in answers), self.model.device
        ids = torch.tensor([[0] * (length - len(a.ids)) + a.ids for a in answers], device=device)
        mask = torch.tensor([[0] * (length - len(a.ids)) + [1] * len(a.ids) for a in answers], device=device)
        cache = DynamicCache(config=self.model.config)
        last = self._read(answers, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        self.plain = all(type(layer) is DynamicLayer for layer in cache.layers)
        if self.answers:
            most = max(length, self.mask.shape[1])
            for held, new in zip(self.cache.layers, cache.layers, strict=True):
                for name in ("keys", "values"):
                    setattr(held, name, torch.cat([_wider(getattr(layer, name), most, 2) for layer in (held, new)]))
            mask = torch.cat([_wider(self.mask, most, 1), _wider(mask, most, 1)])
            last, cache = torch.cat([self.last, last]), self.cache
        self.mask, self.last, self.cache = mask, last, cache
        self.answers += answers
        self._show(range(len(self.answers) - len(answers), len(self.answers)))

    def step(self) -> None:
        self.mask = pad(self.mask, (0, 1), value=1)
        self.last = self._read(self.answers, self.last[:, None], self.mask, self.mask.sum(1, keepdim=True) - 1, self.cache)
        self._show(range(len(self.answers)))

    def _read(self, answers: Sequence[Answer], ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
        """The tokens after `ids`, [b], each row's by its own rule."""
        options = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        logits = self.model(input_ids=ids, logits_to_keep=1, **options).logits[:, -1].float()
        kinds: dict[Any, list[int]] = {}
        for row, answer in enumerate(answers):
            kinds.setdefault(answer.choice, []).append(row)
        found = torch.empty(len(answers), dtype=torch.long, device=logits.device)
        for choice, rows in kinds.items():
            (processors, sample), scores = self.rules(choice), logits[rows]
            for processor in processors:
                scores = processor(ids[rows], scores)
            found[rows] = torch.multinomial(scores.softmax(-1), 1)[:, 0] if sample else scores.argmax(-1)
        return found

    def _show(self, rows: Sequence[int]) -> None:
        """Tell the answers of these rows their new token; those that are over leave, and columns that nobody sees with them."""
        for row, token in zip(rows, self.last[rows[0] :].tolist(), strict=True):
            self.answers[row].put(token, self.ends)
        left = [row for row, answer in enumerate(self.answers) if not answer.over]
        if len(left) == len(self.answers):
            return
        self.answers = [self.answers[row] for row in left]
        if not left:
            return
        index = torch.tensor(left, device=self.mask.device)
        self.cache.batch_select_indices(index)
        self.mask, self.last = self.mask[index], self.last[index]
        first = int(self.mask.int().argmax(1).min())
        if first and self.plain:
            self.mask = self.mask[:, first:]
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys[:, :, first:], layer.values[:, :, first:]


def _wider(x: Tensor, length: int, at: int) -> Tensor:
    """Zeros in front along dimension `at`, up to this length."""
    return pad(x, (0, 0) * (x.dim() - 1 - at) + (length - x.shape[at], 0))
