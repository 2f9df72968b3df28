"""The whole order from one row of logits: those of the identifiers where the first one would be written."""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from smelt.rank import Judge
from smelt.rank._prompt import BRACKET, SPACE, Style, chat, clean, encode, fit, listwise
from smelt.spec import Paper, SmeltError

__all__ = ["FirstToken"]

LETTERS = string.ascii_uppercase


@dataclass(frozen=True)
class FirstToken(Judge):
    """order = argsort_i of -s_i, s_i = logit of identifier i ("A", "B", ...) at the first generated position.

    One prefill, no token is generated. The prompt lists the passages as `[A] text` (`identifiers="bracket"`) and
    ends with the opening bracket, or as `Passage A: text` and ends before a space that belongs to the letter
    (`identifiers="space"`), for tokenizers that join bracket and letter. A chat template is used when there is one.
    Equal logits keep the order given. Scores are comparable inside one call only. At most 26 passages.

    Cost: FLOPs of one forward over the prompt (about n x `words` x 1.3 tokens), one row of logits. When the prompt
    does not fit in the model's context, the query and every passage are cut to the same smaller number of words.

    Raises SmeltError for an identifier that is not one token of this tokenizer, for more than 26 passages, for a
    model that is not a decoder, for a prompt that does not fit with one word each, and for logits that are not finite.

    Differs from the paper: the full row of logits is read, so no identifier can be missing (the authors read the 30
    largest); the wording of the prompt is ours, and one turn; passages are cut in one step by bisection.
    """

    paper: ClassVar = Paper("FIRST: Faster Improved Listwise Reranking with Single Token Decoding", "arXiv:2406.15657", "section 3")
    limit: ClassVar[int | None] = len(LETTERS)
    words: Annotated[int, Ge(1)] = 300  # kept of the query and of each passage
    identifiers: Literal["bracket", "space"] = "bracket"

    def __call__(self, query: str, passages: list[str], model: Any) -> list[int]:
        if len(passages) < 2:
            return list(range(len(passages)))
        return torch.argsort(self.scores(query, passages, model), descending=True, stable=True).tolist()

    def scores(self, query: str, passages: list[str], model: Any) -> Tensor:
        """s [n], the logits of the identifiers, float32 on CPU."""
        if len(passages) > len(LETTERS):
            raise SmeltError(
                f"first_token has {len(LETTERS)} identifiers and was given {len(passages)} passages; "
                "call it through sliding_window(judge=first_token())"
            )
        if model is None or not model.model.can_generate():
            kind = "none" if model is None else type(model.model).__name__
            raise SmeltError(f"first_token needs a decoder as its model and was given {kind}")
        style = BRACKET if self.identifiers == "bracket" else SPACE
        names = LETTERS[: len(passages)]
        tokens, template = self._tokens(model.tokenizer, names, style), chat(model.tokenizer)

        def build(words: int) -> list[int]:
            text = listwise(clean(query, words), [clean(p, words) for p in passages], names, style, template)
            return encode(model.tokenizer, text, template is not None)

        ids = fit(
            build, self.words, model.model.config.get_text_config().max_position_embeddings, f"{len(passages)} passages and the query"
        )
        with torch.no_grad():
            read = torch.tensor([ids], device=model.model.device)
            row = model.model(input_ids=read, use_cache=False, logits_to_keep=1).logits[0, -1]
        scores = row[torch.tensor(tokens, device=row.device)].float().cpu()
        if not torch.isfinite(scores).all():
            raise SmeltError("first_token: the model's logits are not finite")
        return scores

    def _tokens(self, tokenizer: Any, names: str, style: Style) -> list[int]:
        """The token of each identifier where it will be written: exactly one, its own, after an unchanged ending."""
        written = [style.ending] + [style.ending + style.name.format(id=name) for name in names]
        ending, *named = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
        tokens: list[int] = []
        for name, ids in zip(names, named, strict=True):
            if ids[:-1] != ending or ids[-1] in (*tokens, tokenizer.unk_token_id):
                other = "space" if style is BRACKET else "bracket"
                raise SmeltError(
                    f"first_token: '{name}' after '{style.ending}' is not one token of its own for {type(tokenizer).__name__}; "
                    f"try first_token(identifiers='{other}')"
                )
            tokens.append(ids[-1])
        return tokens
