"""The text a listwise judge reads: the query, one line per passage with its identifier, and the query again.

A causal model has not yet read the query's purpose when it meets the passages, so the query stands before and after
them. Text is collapsed to single spaces and cut to a number of words; what looks like an identifier inside it loses
its brackets, `[B]` -> `(B)`, or it would be read as one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from smelt.spec import SmeltError

__all__ = ["BRACKET", "SPACE", "WRITTEN", "Style", "chat", "clean", "encode", "fit", "listwise", "named"]


class Style(NamedTuple):
    """How identifiers look in the passages, what the prompt ends with, and how an identifier is written after that."""

    line: str  # with {id} and {text}
    ending: str
    name: str  # with {id}
    form: str = ""  # what the request adds for a model that writes the whole order


BRACKET = Style("[{id}] {text}", "Order: [", "{id}")
SPACE = Style("Passage {id}: {text}", "Order:", " {id}")
WRITTEN = Style("[{id}] {text}", "Order:", " [{id}]", " Write every identifier once, in the form [] > [], and nothing else.")


def clean(text: str, words: int) -> str:
    return re.sub(r"\[([A-Z]|\d+)\]", r"(\1)", " ".join(text.split()[:words]))


def listwise(query: str, passages: Sequence[str], identifiers: Sequence[str], style: Style, template: Callable[[str], str] | None) -> str:
    """The prompt up to where the first identifier is written. `template` makes the request a chat turn and opens the answer."""
    lines = "\n".join(style.line.format(id=i, text=p) for i, p in zip(identifiers, passages, strict=True))
    request = (
        f"Below are {len(passages)} passages, each with its identifier. Query: {query}\n\n{lines}\n\n"
        f"Query: {query}\nOrder the {len(passages)} passages by how well they answer the query, the best first, by identifier alone."
        f"{style.form}"
    )
    return (request + "\n" if template is None else template(request)) + style.ending


def chat(tokenizer: Any) -> Callable[[str], str] | None:
    """The tokenizer's own chat template around one user turn, the model's turn opened; None when it has none."""
    if not tokenizer.chat_template:
        return None

    def template(request: str) -> str:
        turn = [{"role": "user", "content": request}]
        return tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)

    return template


def encode(tokenizer: Any, text: str, templated: bool) -> list[int]:
    """Ids of a prompt to be continued: with the tokenizer's opening tokens unless a chat template wrote them, never its closing ones."""
    ids = list(tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"])
    while ids and ids[-1] in tokenizer.all_special_ids:
        ids.pop()
    return ids


def fit(build: Callable[[int], list[int]], words: int, room: int, what: str) -> list[int]:
    """`build(w)` for the largest w <= words (words kept of each text) whose ids fit in `room`; found by bisection.

    Raises SmeltError when one word each is already too much: then fewer passages must be asked for at once.
    """
    ids = build(words)
    if len(ids) <= room:
        return ids
    best, low, high = build(1), 1, words
    if len(best) > room:
        raise SmeltError(f"{what} need {len(best)} tokens with one word each, and the model reads {room}; take a smaller window")
    while high - low > 1:
        middle = (low + high) // 2
        ids = build(middle)
        if len(ids) <= room:
            best, low = ids, middle
        else:
            high = middle
    return best


def named(tokenizer: Any, names: str, style: Style, method: str) -> list[int]:
    """The token of each identifier where it will be written: one, its own, after an unchanged ending. Else a SmeltError of `method`."""
    written = [style.ending] + [style.ending + style.name.format(id=name) for name in names]
    ending, *each = tokenizer(written, add_special_tokens=False, verbose=False)["input_ids"]
    tokens: list[int] = []
    for name, ids in zip(names, each, strict=True):
        if ids[:-1] != ending or ids[-1] in (*tokens, tokenizer.unk_token_id):
            other = "space" if style.name == BRACKET.name else "bracket"
            raise SmeltError(
                f"{method}: '{name}' after '{style.ending}' is not one token of its own for {type(tokenizer).__name__}; "
                f"try {method}(identifiers='{other}')"
            )
        tokens.append(ids[-1])
    return tokens
