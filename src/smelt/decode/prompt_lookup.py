"""Drafts copied from the text so far, checked by the model in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge

from smelt.decode._loop import Choice
from smelt.decode._verify import Draft, Drafter, Drafting
from smelt.spec import Paper

__all__ = ["PromptLookup"]


@dataclass(frozen=True)
class PromptLookup(Drafting):
    """draft = x_{i+n} .. x_{i+n+k-1}: what followed the last place i where the last n tokens stood before.

    n runs from `ngram` down to 1 until there is such a place, k = `tokens`; without one the step is a plain one. A copy
    that reaches the end of the text goes on with its own beginning, as a repeated line would. The target reads the
    draft in one call and keeps it as far as it agrees: under greedy search while the draft is the arg-max, under
    sampling while a draw from the target equals it, the exact rule for a draft that is certain of itself.

    Cost: no draft model; one table entry per token and n (no search), and `tokens` more positions in each call of the
    target. Greedy output equals plain greedy up to ties of logits: in bfloat16 ties do occur.

    Differs from the source: the last match and not the first (text nearby is the likelier model of what follows).
    """

    paper: ClassVar = Paper("Prompt Lookup Decoding", "https://github.com/apoorvumang/prompt-lookup-decoding", "find_candidate_pred_tokens")
    tokens: Annotated[int, Ge(1)] = 10  # k, drafted per call
    ngram: Annotated[int, Ge(1)] = 2  # longest n that is looked up

    def drafter(self, model: Any, tokenizer: Any) -> Drafter:
        return _Copies(self.tokens, self.ngram)

    @classmethod
    def example(cls, draft: Path) -> PromptLookup:
        return cls(tokens=3)


class _Copies(Drafter):
    def __init__(self, tokens: int, ngram: int):
        self.tokens, self.ngram = tokens, ngram

    def begin(self, text: list[int], choice: Choice) -> None:
        self.after: list[dict[tuple[int, ...], int]] = [{} for _ in range(self.ngram)]  # by n - 1: n-gram -> where what follows it begins
        self.known = 0

    def draft(self, text: list[int], room: int) -> Draft | None:
        for end in range(self.known + 1, len(text)):  # n-grams that something follows already
            for n in range(1, min(self.ngram, end) + 1):
                self.after[n - 1][tuple(text[end - n : end])] = end
        self.known = max(self.known, len(text) - 1)
        for n in range(min(self.ngram, len(text)), 0, -1):
            at = self.after[n - 1].get(tuple(text[-n:]))
            if at is not None:
                period = text[at:]
                count = min(self.tokens, room)
                return Draft(torch.tensor([period[i % len(period)] for i in range(count)]))
        return None

    def kept(self, text: list[int], read: int, hidden: Any) -> None:
        pass
