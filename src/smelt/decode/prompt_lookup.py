"""Drafts copied from the text so far, checked by the model in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from smelt.decode import Decoding
from smelt.spec import Paper

__all__ = ["PromptLookup"]


@dataclass(frozen=True)
class PromptLookup(Decoding):
    """draft = x_{i+n} .. x_{i+n+k-1}: what followed the first place i where the last n tokens stood before.

    n runs from `ngram` down to 1 until there is such a place, k = `tokens`; without one the step is a plain one. The
    target reads the draft in one call and keeps it as far as it agrees: under greedy search while the draft is the
    arg-max, under sampling while a draw from the target equals it, which is the exact rule for a draft that is
    certain of itself (speculative sampling with a one-hot q). One row at a time: transformers refuses a batch.

    Cost: no draft model; a search over the text per call, and `tokens` more positions in each call of the target.
    Greedy output equals plain greedy up to ties of logits: in bfloat16 ties do occur.

    Differs from the source: transformers' own search is used, which takes the first match and not the last; a draft
    ends before an end-of-text token and before a token that the logits processors forbid.
    """

    paper: ClassVar = Paper("Prompt Lookup Decoding", "https://github.com/apoorvumang/prompt-lookup-decoding", "find_candidate_pred_tokens")
    lossless: ClassVar[bool] = True
    crops: ClassVar[bool] = True
    tokens: Annotated[int, Ge(1)] = 10  # k, drafted per call
    ngram: Annotated[int, Ge(1)] = 2  # longest n that is looked up

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {"prompt_lookup_num_tokens": self.tokens, "max_matching_ngram_size": self.ngram}

    @classmethod
    def example(cls, draft: Path) -> PromptLookup:
        return cls(tokens=3)
