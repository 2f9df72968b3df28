"""Sets in a prompt: which tokens are markers, what every token sees, and where it stands. For `set_based`."""

from __future__ import annotations

import re
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from smelt.spec import SmeltError

__all__ = ["Marker", "Prompt", "Read", "layout", "markers", "onward", "sees"]


class Marker(NamedTuple):
    first: int  # token
    stop: int  # the token behind it
    kind: str  # "open", "split", "close"


class Prompt(NamedTuple):
    """Where the tokens of a batch [b, t] stand."""

    group: Tensor  # which set, 0 outside
    part: Tensor  # which member, counted through the row, 0 outside
    visible: Tensor  # bool: text, no marker and no padding
    position: Tensor
    after: Tensor  # position of the token that comes next


class Read(NamedTuple):
    """What a cache holds, [b, s]."""

    visible: Tensor
    after: Tensor
    prompt: int  # tokens of the first call, whose sets are over


def markers(texts: list[str], opening: str, split: str, closing: str) -> list[Marker]:
    """Those of a row, in order, from the texts of its tokens, with the white space in front of them. Raises SmeltError where they do
    not match or share a token with text."""
    kinds = {opening: "open", split: "split", closing: "close"}
    text, ends = "".join(texts), torch.tensor(list(accumulate(map(len, texts))))
    found: list[Marker] = []
    within = False
    for match in re.finditer("|".join(re.escape(m) for m in sorted(kinds, key=len, reverse=True)), text):
        first = int(torch.searchsorted(ends, match.start(), right=True))
        stop = int(torch.searchsorted(ends, match.end())) + 1
        whole, kind = "".join(texts[first:stop]), kinds[match[0]]
        if whole.strip() != match[0].strip():
            raise SmeltError(f"set_based: {match[0]!r} shares a token with text beside it ({whole!r}); put a space or a line break between")
        if (kind == "open") == within:
            raise SmeltError(f"set_based: {match[0]!r} {'inside' if within else 'outside'} of a set, at token {first}")
        while first > (found[-1].stop if found else 0) and not texts[first - 1].strip():
            first -= 1  # how space is cut may follow from the marker behind it, which changes with the order
        within = kind != "close"
        found.append(Marker(first, stop, kind))
    if within:
        raise SmeltError(f"set_based: a set is never closed; {closing!r} is missing")
    return found


def layout(found: list[list[Marker]], real: Tensor) -> Prompt:
    """Everything about a batch; real [b, t] bool."""
    group, part, position, after = (torch.zeros(real.shape, dtype=torch.long) for _ in range(4))
    visible = real.clone()
    for row, some in enumerate(found):
        count = real[row].long().cumsum(0)
        cursor = start = longest = groups = parts = 0
        within = False
        for first, stop, kind in [*some, Marker(real.shape[1], real.shape[1], "")]:
            text = slice(cursor, first)
            ahead = count[text] - (count[cursor - 1] if cursor else 0)
            position[row, text], after[row, text] = (start + ahead - 1).clamp(min=0), start + ahead
            size = int(ahead[-1]) if len(ahead) else 0
            if within:
                group[row, text], part[row, text] = groups, parts
                longest = max(longest, size)
            else:
                start += size
            if kind == "close":
                start, within = start + longest, False
            elif kind:
                parts += 1
                if kind == "open":
                    groups, longest, within = groups + 1, 0, True
            position[row, first:stop] = after[row, first:stop] = start
            visible[row, first:stop] = False
            cursor = stop
    return Prompt(group, part, visible, position, after)


def sees(prompt: Prompt) -> Tensor:
    """[b, t, t] bool. Every token sees itself, or a marker and a pad would have nothing to see."""
    group, part, size = prompt.group, prompt.part, prompt.group.shape[1]
    open_to = (group[:, None] == 0) | (part[:, None] == part[:, :, None]) | (group[:, None] != group[:, :, None])
    causal = torch.ones(size, size, dtype=torch.bool, device=group.device).tril()
    return (open_to & prompt.visible[:, None] & causal) | torch.eye(size, dtype=torch.bool, device=group.device)


def onward(read: Read, real: Tensor, seen: int) -> tuple[Tensor, Tensor, Read]:
    """Mask [b, t, s] and positions [b, t] of tokens behind those that were read, and what has been read with them."""
    if read.visible.shape[0] != real.shape[0] or not read.prompt <= seen <= read.visible.shape[1]:
        raise SmeltError("set_based: this cache has other rows or tokens than were read, or was cut inside the prompt")
    new = real[:, seen:]
    after = read.after[:, seen - 1 : seen] + new.long().cumsum(1)
    visible = torch.cat([read.visible[:, :seen], new], 1)
    size = new.shape[1]
    itself = torch.eye(size, dtype=torch.bool, device=new.device)
    causal = torch.ones(size, size, dtype=torch.bool, device=new.device).tril()
    among = (new[:, None] & causal) | itself
    seeing = torch.cat([read.visible[:, None, :seen].expand(-1, size, -1), among], 2)
    return seeing, (after - 1).clamp(min=0), Read(visible, torch.cat([read.after[:, :seen], after], 1), read.prompt)
