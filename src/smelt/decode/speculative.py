"""Drafts written by a small model, checked by the large one in one call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge

from smelt.decode import Decoding
from smelt.model._load import load, same_tokenizer
from smelt.spec import Paper, SmeltError

__all__ = ["Speculative"]


@dataclass(frozen=True)
class Speculative(Decoding):
    """accept x ~ q with probability min(1, p(x) / q(x)), else draw from norm(max(p - q, 0)): the output's law is p.

    p the target, q the draft, both after the logits processors. The draft writes `length` tokens, the target reads
    them in one call and keeps them up to the first rejection, and always adds one of its own. With acceptance a per
    token, tokens per call = (1 - a^(length+1)) / (1 - a). Greedy: kept while equal to the arg-max, so the output is
    that of plain greedy search up to ties of logits. One row at a time: transformers refuses a batch.

    `schedule="heuristic"`: two tokens more after a draft that was kept whole, one fewer (at least 1) after another;
    "constant" keeps `length`; every text starts with `length` again. Either way the number does not look at tokens not
    yet drafted, so the law stays p.

    Cost per call: length + 1 positions of the target and `length` calls of the draft; memory: the draft's weights
    and its own cache. On small models the draft often costs more time than it saves: count calls.

    Raises SmeltError for a draft that is not a decoder, whose tokenizer gives ids another meaning, or whose
    vocabulary has another size: transformers would translate between them, but its sampling then crashes or
    replaces the draft's head in place.

    Differs from the paper: no stop on a low probability of the draft (transformers' confidence threshold is off).
    """

    paper: ClassVar = Paper("Fast Inference from Transformers via Speculative Decoding", "arXiv:2211.17192", "algorithm 1")
    lossless: ClassVar[bool] = True
    crops: ClassVar[bool] = True
    draft: str = "embedded"  # a folder, a hub id or "embedded"
    length: Annotated[int, Ge(1)] = 5  # tokens drafted per call
    schedule: Literal["constant", "heuristic"] = "constant"

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        loaded = load(self.draft, dtype=model.dtype, device=model.device)
        small = loaded.model
        if not small.can_generate():
            raise SmeltError(f"speculative: the draft '{self.draft}' is not a decoder ({type(small).__name__} writes no text)")
        if tokenizer is None or not same_tokenizer(tokenizer, loaded.tokenizer):
            raise SmeltError(f"speculative: the draft '{self.draft}' has another tokenizer than the model; ids would change their meaning")
        mine, theirs = (m.config.get_text_config().vocab_size for m in (model, small))
        if mine != theirs:
            raise SmeltError(
                f"speculative: the draft '{self.draft}' has {theirs} output tokens and the model has {mine}; they must be equal"
            )
        settings = small.generation_config  # of the draft loaded just above: nobody else holds it
        settings.num_assistant_tokens = self.length
        settings.num_assistant_tokens_schedule = "heuristic_transient" if self.schedule == "heuristic" else "constant"
        settings.assistant_confidence_threshold = 0.0
        return {"assistant_model": small}

    @classmethod
    def example(cls, draft: Path) -> Speculative:
        return cls(draft=str(draft), length=3)
