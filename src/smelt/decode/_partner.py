"""A second model that writes the same text: loaded, and refused where its ids mean other things."""

from __future__ import annotations

from typing import Any

from smelt.model._load import load, same_tokenizer
from smelt.spec import SmeltError

__all__ = ["partner"]


def partner(where: str, name: str, model: Any, tokenizer: Any) -> Any:
    """The decoder `name` in the precision and on the device of `model`. `where` begins the message of a refusal."""
    loaded = load(name, dtype=model.dtype, device=model.device)
    other = loaded.model
    if not other.can_generate():
        raise SmeltError(f"{where} '{name}' is not a decoder ({type(other).__name__} writes no text)")
    if tokenizer is None or not same_tokenizer(tokenizer, loaded.tokenizer):
        raise SmeltError(f"{where} '{name}' has another tokenizer than the model; ids would change their meaning")
    mine, theirs = (m.config.get_text_config().vocab_size for m in (model, other))
    if mine != theirs:
        raise SmeltError(f"{where} '{name}' has {theirs} output tokens and the model has {mine}; they must be equal")
    return other
