"""Which held-out text is measured on, as token ids with the exact number of bytes of each token.

The choice depends on the corpus and the budget alone, never on the tokenizer: two models with different
tokenizers are measured on the same bytes.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import Any, NamedTuple

import numpy as np

from smelt.data import Corpus, Document
from smelt.data.stdlib import Stdlib
from smelt.spec import SmeltError

__all__ = ["CHARACTERS", "Encoded", "choose", "corpus_of", "encode", "encoded", "prompt", "room"]

CHARACTERS = 4  # of text counted as one token of a budget
_chosen: dict[tuple[Any, ...], tuple[Document, ...]] = {}  # the last few choices, so that k variants read the corpus once


class Encoded(NamedTuple):
    """One document as ids. `bytes[i]` belongs to `ids[i]`; a start token has none."""

    ids: list[int]
    bytes: np.ndarray  # [len(ids)] int64
    start: int  # 1 when ids[0] is a start token, else 0


def corpus_of(variant: Any) -> Corpus:
    return Stdlib() if variant.data is None else variant.data


def room(model: Any, wanted: int) -> int:
    """`wanted` positions, or as many as the model has."""
    config = model.config.get_text_config()
    return min(wanted, getattr(config, "max_position_embeddings", None) or wanted)


def choose(corpus: Corpus, tokens: int, document: int) -> tuple[Document, ...]:
    """Beginnings of documents of the test split, `tokens` in all, at most `document` of each, 4 characters a token.

    Documents are taken in the order of the hash of their names, so they spread over the whole split and the choice
    does not move when documents are added elsewhere. Pieces end at a line end. One pass, O(tokens) memory.
    """
    key = (type(corpus).__qualname__, repr(corpus), corpus.digest(), tokens, document)
    if key not in _chosen:
        while len(_chosen) >= 8:
            _chosen.pop(next(iter(_chosen)))
        _chosen[key] = _choose(corpus, CHARACTERS * tokens, CHARACTERS * document)
    return _chosen[key]


def _choose(corpus: Corpus, budget: int, longest: int) -> tuple[Document, ...]:
    heap: list[tuple[int, str, str]] = []  # the largest hash on top
    total = 0
    for name, text in corpus.documents("test"):
        piece = _cut(text, longest)
        if not piece.strip():
            continue
        heapq.heappush(heap, (-int.from_bytes(hashlib.sha256(name.encode()).digest()), name, piece))
        total += len(piece)
        while total - len(heap[0][2]) >= budget:
            total -= len(heapq.heappop(heap)[2])
    chosen, left = [], budget
    for _, name, text in sorted(heap, reverse=True):
        piece = _cut(text, left)
        left -= len(piece)
        if piece.strip():
            chosen.append(Document(name, piece))
    if not chosen:
        raise SmeltError("the test split of the data is empty, so there is nothing to measure on")
    return tuple(chosen)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: text.rfind("\n", 0, limit) + 1 or limit]


def encode(tokenizer: Any, text: str) -> Encoded:
    """Ids of `text` with the start token before them (bos, else eos, else none), and UTF-8 bytes per token.

    Byte-level tokenizers: one character of the token is one byte. Others: the bytes up to the end of the token less
    those before. The bytes sum to those of the text either way. Raises SmeltError for a tokenizer without offsets.
    """
    if not tokenizer.is_fast:
        raise SmeltError(f"{type(tokenizer).__name__} does not say which text a token covers; a fast tokenizer is needed")
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = list(found["input_ids"])
    size = len(text.encode("utf-8", "replace"))
    counts = np.array([len(t) for t in tokenizer.convert_ids_to_tokens(ids)], dtype=np.int64)
    if counts.sum() != size:
        upto = np.cumsum([0] + [len(c.encode("utf-8", "replace")) for c in text])
        ends = np.maximum.accumulate(np.array([end for _, end in found["offset_mapping"]], dtype=np.int64))
        counts = np.diff(upto[ends], prepend=0) if len(ends) else np.zeros(0, np.int64)
        if len(counts):
            counts[-1] += size - counts.sum()  # trailing white space that the tokenizer drops
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        return Encoded(ids, counts, 0)
    return Encoded([start, *ids], np.concatenate([np.zeros(1, np.int64), counts]), 1)


def encoded(variant: Any, tokens: int, document: int) -> list[Encoded]:
    """The chosen documents of the variant's data, those with something to predict."""
    found = [encode(variant.tokenizer, d.text) for d in choose(corpus_of(variant), tokens, document)]
    return [e for e in found if len(e.ids) > 1]


def prompt(variant: Any, count: int) -> list[int]:
    """`count` ids of real held-out text. Raises SmeltError when the test split is shorter."""
    ids: list[int] = []
    for wanted in (2 * count, 8 * count):  # tokens may be longer than 4 characters
        ids = [i for d in choose(corpus_of(variant), wanted, wanted) for i in encode(variant.tokenizer, d.text).ids]
        if len(ids) >= count:
            return ids[:count]
    raise SmeltError(f"the test split of the data has {len(ids)} tokens; a prompt of {count} was asked for")
