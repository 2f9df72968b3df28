"""Token ids of given text, for methods that measure something before they are bound."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from smelt.recipe import corpus
from smelt.spec import SmeltError

__all__ = ["corpus_of", "rows_of"]

CONTEXT = 512  # tokens of one row at most


def corpus_of(data: Any, method: str) -> Any:
    """`data` is a corpus, text as after `data:` in a recipe, or None for the standard library."""
    found = corpus("stdlib()" if data is None else data) if data is None or isinstance(data, str) else data
    if isinstance(found, type) or not callable(getattr(found, "documents", None)):
        raise SmeltError(f"{method}: data: {data!r} is not a corpus; write one such as stdlib() or files(path='notes')")
    return found


def rows_of(data: Any, model: Any, tokenizer: Any, tokens: int, method: str) -> Iterator[Tensor]:
    """Beginnings [1, t] of documents of the train split, t in 2..512, `tokens` ids in all. Raises SmeltError where there are none."""
    if tokenizer is None:
        raise SmeltError(f"{method}: measuring on text needs the model's tokenizer")
    config = model.config.get_text_config(decoder=True)
    longest = min(CONTEXT, getattr(config, "max_position_embeddings", None) or CONTEXT)
    left = tokens
    for document in corpus_of(data, method).documents("train"):
        text = document.text[: 16 * longest]  # no tokenizer in use has longer tokens on average
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: min(longest, left)]
        if len(ids) < 2:
            continue
        if max(ids) >= config.vocab_size:
            raise SmeltError(f"{method}: the tokenizer has ids that the model, with {config.vocab_size} tokens, has not")
        yield torch.tensor([ids], device=model.device)
        left -= len(ids)
        if left < 2:
            return
    if left == tokens:
        raise SmeltError(f"{method}: the train split of the data has no document of two tokens to measure on")
