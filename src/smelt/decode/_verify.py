"""The one loop of all lossless drafting: a draft, one call of the target over it, the rule that keeps what the target would have said.

A method gives a `Drafter`; the loop is transformers' `custom_generate`. Every call of the target reads what its cache
has not seen (in the first call the prompt) and the draft behind it: a chain, or a tree under a mask that shows each
node its own ancestors. Kept tokens that do not stand at the front of a tree are moved there in a plain cache, and in
any other read again with the next draft, so every cache that can forget its last tokens will do.

Cost per round: one call of the target over 1 + nodes positions (and the tokens of a path not at the front), one
call of each logits processor per node that depends on the text before it (penalties; temperature, top-k and top-p do not).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from smelt.decode import Decoding
from smelt.decode._loop import Choice, Row, Written, looped
from smelt.decode._rule import keep_chain, keep_tree

__all__ = ["Draft", "Drafter", "Drafting", "verified"]

LARGEST = 1024  # positions up to which a tree's mask is made; behind a longer prompt only its first path is read


@dataclass(frozen=True)
class Draft:
    """`tokens` [n]; `parents` of each node of a tree (-1 the text's end, a parent before its children), None for a chain;
    `law` [n, V] the distribution each was drawn from, None when the draft is certain of itself."""

    tokens: Tensor
    parents: Sequence[int] | None = None
    law: Tensor | None = None


class Drafter(ABC):
    """Writes drafts for one text at a time. Made when the method is bound; `begin` starts another text."""

    reads: ClassVar[bool] = False  # wants the target's last hidden states, what its head reads

    @abstractmethod
    def begin(self, text: list[int], choice: Choice) -> None: ...

    @abstractmethod
    def draft(self, text: list[int], room: int) -> Draft | None:
        """At most `room` tokens deep, after `text`, whose last token the target has not read yet. None: a plain step."""

    @abstractmethod
    def kept(self, text: list[int], read: int, hidden: Tensor | None) -> None:
        """After every call: the text as it is now; `hidden` [k, d] of its tokens read..read+k, in order, if `reads`."""


class Drafting(Decoding):
    """A lossless method: what it drafts with; the rest is `verified`."""

    lossless: ClassVar[bool] = True
    crops: ClassVar[bool] = True

    @abstractmethod
    def drafter(self, model: Any, tokenizer: Any) -> Drafter: ...

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {"custom_generate": verified(self.drafter(model, tokenizer))}


def verified(drafter: Drafter) -> Callable[..., Any]:
    """What `generate` takes as custom_generate."""
    return looped("drafting", lambda model, row: _Text(model, drafter, row).write())


class _Text:
    """One row while it is written."""

    def __init__(self, model: Any, drafter: Drafter, row: Row):
        self.model, self.drafter, self.row = model, drafter, row
        self.choice, self.cache, self.prompt, self.text = row.choice, row.cache, row.prompt, row.text
        self.start, self.most = len(row.text), len(row.text) + row.room
        self.read = row.cache.get_seq_length() if row.cache is not None else 0
        text_config = model.config.get_text_config(decoder=True)
        windows = getattr(text_config, "sliding_window", None) and getattr(text_config, "use_sliding_window", True)
        self.chains = bool(windows) or str(text_config._attn_implementation).startswith("smelt_")  # a tree's mask would replace theirs
        self.scores: list[Tensor] = []

    def write(self) -> Written:
        self.drafter.begin(list(self.text), self.choice)
        device, recording = self.prompt.device, False
        reading: Any = _states(self.model) if self.drafter.reads else nullcontext([])
        with reading as states:
            while True:
                room = self.most - len(self.text) - 1
                draft = self.drafter.draft(self.text, room) if room > 0 else None
                if draft is not None and not len(draft.tokens):
                    draft = None
                unread = self.text[self.read :]
                if draft is not None and draft.parents is not None and (self.chains or len(unread) + len(draft.tokens) > LARGEST):
                    draft = _first_path(draft)
                if draft is not None and not recording and self.cache is not None:
                    self.cache.activate_past_recording()
                    recording = True
                nodes = draft.tokens.tolist() if draft is not None else []
                ids = torch.tensor([unread + nodes], device=device)
                more = self._tree(len(unread), draft.parents, device) if draft is not None and draft.parents is not None else {}
                out = self.model(
                    input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=len(nodes) + 1, return_dict=True, **more
                )
                self.cache = out.past_key_values
                logits = out.logits[0, -len(nodes) - 1 :]
                path, token, scores = self._rule(draft, nodes, logits)
                new = [nodes[i] for i in path] + [token]
                front = next((i for i, node in enumerate(path) if node != i), len(path))  # of the path, in place in the cache
                if front < len(path) and _moved(self.cache, self.read + len(unread), path):
                    front = len(path)
                stay = len(unread) + front
                surplus = len(unread) + len(nodes) - stay
                new, done = self._stopped(new)
                if len(new) <= front:  # the text ended inside the kept draft: its last token is not read
                    surplus += front - len(new) + 1
                    stay -= front - len(new) + 1
                if recording:
                    self.cache.crop(-surplus)  # also by 0: what stays may now be compressed, or leave a window
                before = self.read
                self.read += stay
                self.text += new
                self.scores += [row[None] for row in scores[: len(new)]] if self.row.scored else []
                self.row.show(new)
                if done:
                    return Written(self.text[self.start :], self.cache, self.scores)
                hidden = None
                if self.drafter.reads:
                    rows = states.pop()[0]
                    hidden = torch.cat([rows[: len(unread)], rows[[len(unread) + i for i in path]]])
                self.drafter.kept(self.text, before, hidden)

    def _rule(self, draft: Draft | None, nodes: list[int], logits: Tensor) -> tuple[list[int], int, Tensor]:
        """(nodes kept, the token after them, processed scores of each new token)."""
        parents = range(-1, len(nodes) - 1) if draft is None or draft.parents is None else draft.parents
        texts: list[list[int]] = []
        if not self.choice.free:
            texts = [list(self.text)]
            for node, parent in zip(nodes, parents, strict=True):
                texts.append([*texts[parent + 1], node])
        scores = self.choice.scores(texts, logits)
        tokens = draft.tokens.to(scores.device) if draft is not None else torch.empty(0, dtype=torch.long, device=scores.device)
        law = draft.law if draft is not None else None
        if draft is None or draft.parents is None:
            count, token = keep_chain(tokens, scores, law, self.choice.sample)
            path = list(range(count))
        else:
            path, token = keep_tree(tokens, draft.parents, scores, law, self.choice.sample)
        return path, token, scores[[0, *(i + 1 for i in path)]]

    def _tree(self, unread: int, parents: Sequence[int], device: Any) -> dict[str, Tensor]:
        """A mask that shows every node the text and its ancestors, and positions by depth."""
        n, total = len(parents), self.read + unread + len(parents)
        sees = torch.zeros(unread + n, total, dtype=torch.bool)
        sees[:, : self.read] = True
        sees[:unread, self.read : self.read + unread] = torch.ones(unread, unread, dtype=torch.bool).tril()
        sees[unread:, self.read : self.read + unread] = True
        inside = sees[unread:, self.read + unread :]
        depth = [0] * n
        for node, parent in enumerate(parents):
            if parent >= 0:
                inside[node] = inside[parent]
                depth[node] = depth[parent] + 1
            inside[node, node] = True
        places = [*range(self.read, self.read + unread), *(self.read + unread + d for d in depth)]
        dtype = self.model.dtype
        mask = torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
        return {"attention_mask": mask[None, None].to(device), "position_ids": torch.tensor([places], device=device)}

    def _stopped(self, new: list[int]) -> tuple[list[int], bool]:
        """The new tokens up to the first at which plain decoding would have stopped, and whether there is one."""
        most = self.most - len(self.text)
        end = next((i + 1 for i, token in enumerate(new) if token in self.row.ends), len(new) + 1)
        cut = min(len(new), most, end)
        done = end <= cut or cut >= most
        said = self.text[self.start :]
        if self.row.stops(said + new[:cut]):
            cut = next(i for i in range(1, cut + 1) if i == cut or self.row.stops(said + new[:i]))
            done = True
        return new[:cut], done


def _moved(cache: Any, start: int, path: Sequence[int]) -> bool:
    """Move what a plain cache holds of the kept nodes to the front of the tree. False for other caches, which read them again."""
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        return False
    for layer in cache.layers:
        at = torch.tensor(path, device=layer.keys.device) + start
        for rows in (layer.keys, layer.values):
            rows[:, :, start : start + len(path)] = rows[:, :, at]
    return True


def _first_path(draft: Draft) -> Draft:
    """The chain of first children."""
    assert draft.parents is not None
    path, at = [], -1
    for node, parent in enumerate(draft.parents):
        if parent == at:
            path.append(node)
            at = node
    return Draft(draft.tokens[path], None, None if draft.law is None else draft.law[path])


@contextmanager
def _states(model: Any) -> Iterator[list[Tensor]]:
    """The last hidden states of every call, newest last: what the head reads."""
    seen: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _, __, out: seen.append(out.last_hidden_state))
    try:
        yield seen
    finally:
        handle.remove()
