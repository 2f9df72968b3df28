"""The whole order from one row of logits: those of the identifiers where the first one would be written."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.rank import Answer, Asked, Scoring
from smelt.rank._order import sort
from smelt.rank._prompt import BRACKET, SPACE, Style, chat, clean, encode, fit, listwise, named
from smelt.rank._reading import last_logits, needs_decoder, room
from smelt.spec import Paper, SmeltError

__all__ = ["FirstToken"]

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class FirstToken(Scoring):
    """order = argsort_i of -s_i, s_i = logit of identifier i ("A", "B", ...) at the first generated position.

    One prefill, no token is generated. The prompt lists the passages as `[A] text` (`identifiers="bracket"`) and
    ends with the opening bracket, or as `Passage A: text` and ends before a space that belongs to the letter
    (`identifiers="space"`), for tokenizers that join bracket and letter. A chat template is used when there is one.
    Equal logits keep the order given. Scores are comparable inside one call only. At most 26 passages.

    Cost: FLOPs of one forward over the prompt (about n x `words` x 1.3 tokens), one row of logits. When the prompt
    does not fit in the model's context, the query and every passage are cut to the same smaller number of words.

    Raises SmeltError for an identifier that is not one token of this tokenizer, for a
    model that is not a decoder, for a prompt that does not fit with one word each, and for logits that are not finite.

    Differs from the paper: the full row of logits is read, so no identifier can be missing (the authors read the 30
    largest); the wording of the prompt is ours, and one turn; passages are cut in one step by bisection.
    """

    paper: ClassVar = Paper("FIRST: Faster Improved Listwise Reranking with Single Token Decoding", "arXiv:2406.15657", "section 3")
    limit: ClassVar[int | None] = len(LETTERS)
    words: Annotated[int, Ge(1)] = 300  # kept of the query and of each passage
    identifiers: Literal["bracket", "space"] = "bracket"

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        """s [n] of each question: the logits of its identifiers, float32 on CPU."""
        needs_decoder(model, "first_token")
        style = BRACKET if self.identifiers == "bracket" else SPACE
        tokens = torch.tensor(named(model.tokenizer, LETTERS[: max((len(a.passages) for a in asked), default=0)], style, "first_token"))
        rows = last_logits(model, [self.prompt(a, model, style) for a in asked])
        found = [row[tokens[: len(a.passages)]] for row, a in zip(rows, asked, strict=True)]
        if not all(torch.isfinite(s).all() for s in found):
            raise SmeltError("first_token: the model's logits are not finite")
        return found

    def prompt(self, asked: Asked, model: Any, style: Style) -> list[int]:
        """Ids up to where the first identifier is written."""
        n, template = len(asked.passages), chat(model.tokenizer)

        def build(words: int) -> list[int]:
            text = listwise(clean(asked.query, words), [clean(p, words) for p in asked.passages], LETTERS[:n], style, template)
            return encode(model.tokenizer, text, template is not None)

        return fit(build, self.words, room(model), f"{n} passages and the query")
