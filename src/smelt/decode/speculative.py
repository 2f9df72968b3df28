"""Drafts written by a small model, checked by the large one in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge

from smelt.decode._loop import Choice
from smelt.decode._partner import partner
from smelt.decode._rule import drawn
from smelt.decode._verify import Draft, Drafter, Drafting
from smelt.spec import Paper

__all__ = ["Speculative"]


@dataclass(frozen=True)
class Speculative(Drafting):
    """accept x ~ q with probability min(1, p(x) / q(x)), else draw from norm(max(p - q, 0)): the output's law is p.

    p the target, q the draft, both after the logits processors. The draft writes `length` tokens, the target reads
    them in one call and keeps them up to the first rejection, and always adds one of its own. With acceptance a per
    token, tokens per call = (1 - a^(length+1)) / (1 - a). Greedy: kept while equal to the arg-max, so the output is
    that of plain greedy search up to ties of logits.

    `schedule="heuristic"`: two tokens more after a draft that was kept whole, one fewer (at least 1) after another;
    "constant" keeps `length`; every text starts with `length` again. Either way the number does not look at tokens not
    yet drafted, so the law stays p.

    Cost per call: length + 1 positions of the target and `length` calls of the draft; memory: the draft's weights
    and its own cache. On small models the draft often costs more time than it saves: count calls.

    Raises SmeltError for a draft that is not a decoder, whose tokenizer gives ids another meaning, or whose
    vocabulary has another size.
    """

    paper: ClassVar = Paper("Fast Inference from Transformers via Speculative Decoding", "arXiv:2211.17192", "algorithm 1")
    draft: str = "embedded"  # a folder, a hub id or "embedded"
    length: Annotated[int, Ge(1)] = 5  # tokens drafted per call
    schedule: Literal["constant", "heuristic"] = "constant"

    def drafter(self, model: Any, tokenizer: Any) -> Drafter:
        small = partner("speculative: the draft", self.draft, model, tokenizer)
        return _SmallModel(small, self.length, self.schedule == "heuristic")

    @classmethod
    def example(cls, draft: Path) -> Speculative:
        return cls(draft=str(draft), length=3)


class _SmallModel(Drafter):
    """A model with a cache of its own, cropped to what the target kept."""

    def __init__(self, model: Any, length: int, adapts: bool):
        self.model, self.first, self.adapts = model, length, adapts

    def begin(self, text: list[int], choice: Choice) -> None:
        self.choice, self.length, self.cache = choice, self.first, None
        self.fed: list[int] = []  # what its cache holds
        self.drafted = self.before = 0

    def draft(self, text: list[int], room: int) -> Draft | None:
        self._forget(text)
        said, laws = list(text), []
        count = min(self.length, room)
        for _ in range(count):
            ids = torch.tensor([said[len(self.fed) :]], device=self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.cache, self.fed = out.past_key_values, list(said)
            scores = self.choice.scores([said], out.logits[0, -1:])
            if self.choice.sample:
                laws.append(scores.softmax(-1))
                said.append(int(drawn(laws[-1])))
            else:
                said.append(int(scores.argmax()))
        self.drafted, self.before = count, len(text)
        return Draft(torch.tensor(said[len(text) :]), None, torch.cat(laws) if laws else None)

    def _forget(self, text: list[int]) -> None:
        """Crop to the common beginning of what was fed and the text as it became. The text's last token is always new to it."""
        same = min(len(self.fed), len(text) - 1)
        for at in range(min(self.before, same), same):
            if self.fed[at] != text[at]:
                same = at
                break
        if self.cache is not None and same < len(self.fed):
            self.cache.crop(same - len(self.fed))
        self.fed = self.fed[:same]

    def kept(self, text: list[int], read: int, hidden: Any) -> None:
        if self.adapts and self.drafted:
            whole = len(text) - self.before == self.drafted + 1
            self.length = self.length + 2 if whole else max(1, self.length - 1)
