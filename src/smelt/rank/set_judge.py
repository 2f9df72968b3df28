"""A judge that gives the same order however its passages are given."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.rank import Answer, Asked, Scoring
from smelt.rank._blocks import MARK, Blocks, compose, read
from smelt.rank._order import by_digest
from smelt.rank._prompt import BRACKET, SPACE, named
from smelt.rank._reading import needs_decoder
from smelt.spec import Paper, SmeltError

__all__ = ["SetJudge"]

LETTERS = string.ascii_uppercase
DECIMALS = 4  # what one model says of the same ids in another batch differs by less


@dataclass(frozen=True)
class SetJudge(Scoring):
    """answer(pi(passages)) = pi(answer(passages)) for every order pi: s_i = logit of identifier i after a set of passages.

    A passage sees the instruction, the query and itself; the query written again at the end sees all; positions of every
    passage begin after the instruction, those of the end after the longest one. No hidden state at the end depends then
    on the order of the passages (the paper's theorem, exact but for the order of float sums). Two things could still
    carry it, and do not: identifiers ("A", "B", ...) are given out by a digest of query and passage, and the passages
    are read in that order, so that even the sums are the same. Equal passages are one member of the set and have one
    score. `answers` sorts scores rounded to 4 decimals and breaks ties by the digest; equal passages keep the order given.

    Scores [n] float32: logits, comparable inside one call only. At most 26 passages of `length` tokens.

    The digest makes the answer independent of the order; mask and positions make it independent of who stands
    where in the digest's order. What is left is the letter a passage draws, as arbitrary as the query is.

    Cost: one forward over all tokens, attention pairs linear in the number of passages (`_blocks.read`), one row of logits.
    Raises SmeltError for a model that is no decoder, for an identifier that is not one token, for passages that find no
    room, and for logits that are not finite. Differs from the paper: it answers questions with a set in the prompt, here
    the answer is an order, read off as in `first_token`; the identifiers by digest, the rounding and the one
    tokenization per passage are ours. A model not trained for it reads an unfamiliar prompt, and the authors too lose
    some accuracy: the promise is the invariance, not the quality.
    """

    paper: ClassVar = Paper("Order-Independence Without Fine Tuning (Set-Based Prompting)", "arXiv:2406.06581", "section 3, theorem 1")
    limit: ClassVar[int | None] = len(LETTERS)
    length: Annotated[int, Ge(1)] = 160  # tokens kept of each passage
    identifiers: Literal["bracket", "space"] = "bracket"

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        found = []
        for one, score in zip(asked, self.scores(asked, model), strict=True):
            score = torch.round(score, decimals=DECIMALS)
            places = {one.passages[i]: at for at, i in enumerate(by_digest(one.query, one.passages))}
            order = sorted(range(len(one.passages)), key=lambda i: (-score[i].item(), places[one.passages[i]], i))
            found.append(Answer(order, score))
        return found

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        needs_decoder(model, "set_judge")
        sets = [_members(one) for one in asked]
        style = BRACKET if self.identifiers == "bracket" else SPACE
        tokens = torch.tensor(named(model.tokenizer, LETTERS[: max(map(len, sets), default=0)], style, "set_judge"))
        laid = [self.lay(one.query, members, model) for one, members in zip(asked, sets, strict=True)]
        found = [torch.empty(0)] * len(asked)
        for part in read(model, laid, logits=True):
            for at, which in enumerate(part.which):
                logits = part.output[at].float().cpu()[tokens]
                found[which] = logits[torch.tensor([sets[which].index(p) for p in asked[which].passages])]
        if not all(bool(torch.isfinite(s).all()) for s in found):
            raise SmeltError("set_judge: the model's logits are not finite")
        return found

    def lay(self, query: str, members: Sequence[str], model: Any) -> Blocks:
        """The prompt of a set up to where the first identifier is written; members carry A, B, ... as they stand here."""
        style = BRACKET if self.identifiers == "bracket" else SPACE
        opening = [style.line.format(id=name, text="") for name in LETTERS[: len(members)]]
        request = (
            f"Below is a set of {len(members)} passages, each with its identifier. Query: {MARK}\n\n{MARK}\n"
            f"Query: {MARK}\nOrder the passages by how well they answer the query, the best first, by identifier alone."
        )
        parts = [(name, text, "\n") for name, text in zip(opening, members, strict=True)]
        return compose(model, request, query, parts, style.ending, length=self.length)


def _members(one: Asked) -> list[str]:
    """Each passage once, in an order that does not depend on theirs."""
    return list(dict.fromkeys(one.passages[i] for i in by_digest(one.query, one.passages)))
