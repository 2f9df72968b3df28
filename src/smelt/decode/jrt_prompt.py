"""JRT-Prompt: the model reads the prompt twice before it writes; what it keeps is chosen on second reading."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge

from smelt.decode import Decoding
from smelt.decode._loop import Row, Written, looped
from smelt.decode._rule import drawn
from smelt.spec import Paper, SmeltError

__all__ = ["JrtPrompt"]


@dataclass(frozen=True)
class JrtPrompt(Decoding):
    """p(next | x x ... x, y): the prompt x stands `times` times before the text y that is written; logits processors see x, y.

    For models with a state of fixed size (`based`, `lightning`), which must choose what to keep before they know what is
    asked. A start token stands at the beginning only. The sequences returned have the prompt once.

    Cost: `times` times the prompt's forward positions, and its keys and values where the model keeps any; writing costs the
    same. Rows of a batch are written one after the other, each without its padding; times=1 is plain decoding. What the
    cache has read is not what is returned, so it is not handed back, and one that has read text is refused. Raises
    SmeltError for these, where the repeated prompt is longer than the model's context, and for what loops of
    our own refuse (beams, no cache).

    Differs from the paper: no text between the readings; the whole prompt is repeated, the question with it (as
    there), and there is no template for the task.
    """

    paper: ClassVar = Paper("Just read twice: closing the recall gap for recurrent language models", "arXiv:2407.05483", "JRT-Prompt")
    times: Annotated[int, Ge(1)] = 2

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        start = getattr(tokenizer, "bos_token_id", None)

        def write(model: Any, row: Row) -> Written:
            return written(model, row, repeated(row.text, self.times, start))

        return {"custom_generate": looped("jrt_prompt", write)}

    @classmethod
    def example(cls, draft: Path) -> Self:
        return cls()


def repeated(text: list[int], times: int, start: int | None) -> list[int]:
    """The text so often, a start token only at the first."""
    again = text[1:] if len(text) > 1 and text[0] == start else text
    return text + again * (times - 1)


def written(model: Any, row: Row, read: list[int]) -> Written:
    """What the model writes after `read`, chosen as if it followed row.text."""
    if row.cache is not None and row.cache.get_seq_length():
        raise SmeltError("jrt_prompt reads a whole prompt again and cannot continue a cache that has read text already")
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and len(read) > most:
        raise SmeltError(f"jrt_prompt: the repeated prompt has {len(read)} tokens, and the model's context is {most}; shorten it")
    cache, ids = row.cache, read
    new: list[int] = []
    kept = []
    while True:
        out = model(
            input_ids=torch.tensor([ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1, return_dict=True
        )
        cache = out.past_key_values
        scores = row.choice.scores([row.text + new], out.logits[0, -1:])
        new.append(int(drawn(scores.softmax(-1))) if row.choice.sample else int(scores.argmax()))
        kept += [scores] * row.scored
        row.show(new[-1:])
        if row.over(new):
            return Written(new, None, kept)
        ids = new[-1:]
