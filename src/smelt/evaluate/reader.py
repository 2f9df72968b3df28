"""What the lines that a judge keeps of retrieved text are worth to the model that reads them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import numpy as np
from annotated_types import Ge, Gt, Le

from smelt.data._code_search import candidates, functions, held_out
from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder, log_probabilities, query_likelihood
from smelt.evaluate._text import encode, room
from smelt.model._load import Loaded, load
from smelt.rank import Asked
from smelt.rank._order import order
from smelt.spec import Paper, SmeltError

__all__ = ["Reader"]

CUT = 160  # tokens of a retrieved passage


class Question(NamedTuple):
    query: str
    lines: list[str]  # of what was retrieved, in its order
    ids: list[list[int]]  # of the lines
    before: list[int]  # what the reader is asked
    after: list[int]  # what it has to say: the function itself
    bytes: int  # of `after`


@dataclass(frozen=True)
class Reader(Probe):
    """reader_gain = (bits of the function without any text - bits of it with the lines kept) / bytes of the function.

    A reader, always the same, predicts held-out functions of the standard library from the first sentence of their
    docstrings. Before it stands what BM25 finds for that sentence: the first `passages` other functions, without docstrings.
    The variant's `rank` method orders their lines (without one, by query likelihood); from the best on those are kept
    that still fit into `share` of the tokens, and put before the reader in the order they had.

    Beside it, the same for every variant: reader_gain_all (nothing dropped) and reader_gain_random (lines in the order of
    their hashes, the same share), and reader_share, the tokens kept. A gain may be below zero: text can mislead.
    Samples are functions, weights their bytes (tokens for reader_share). The reader sees `length` tokens of a function.

    Cost: the judge over all lines (about 60 for 5 passages); queries * 4 rows of at most passages * 160 + length tokens.
    Raises SmeltError where a reader is no decoder or its context is too small, and without a rank method for a model
    without a language head.
    """

    paper: ClassVar = Paper(
        "RECOMP: Improving Retrieval-Augmented LMs with Compression", "arXiv:2310.04408", "language modelling: what a reader gains"
    )
    queries: Annotated[int, Ge(1)] = 100
    passages: Annotated[int, Ge(1), Le(100)] = 5
    share: Annotated[float, Gt(0), Le(1)] = 0.1
    length: Annotated[int, Ge(1)] = 200
    reader: str = "embedded"
    batch: Annotated[int, Ge(1)] = 8
    prefill: Annotated[int, Ge(1)] = 64
    chunk: Annotated[int, Ge(1)] = 64

    @classmethod
    def example(cls) -> Self:
        return cls(queries=3, passages=2, length=32)

    def __call__(self, variant: Variant) -> list[Metric]:
        asked, none, full, random = _prepared(self.reader, self.queries, self.passages, self.length, self.share, self.batch)
        lists = [Asked(one.query, one.lines) for one in asked]
        if variant.rank is None:
            decoder(variant, "reader")
            how = {"batch": self.batch, "prefill": self.prefill, "chunk": self.chunk}
            after = [Asked("\n# " + one.query, one.passages) for one in lists]
            orders = [np.argsort(-s, kind="stable").tolist() for s in query_likelihood(variant, after, CUT, **how)]
        else:
            orders = order(variant.rank, lists, Loaded(variant.model, variant.tokenizer, variant.folder))
        kept = [best(one, places, self.share) for one, places in zip(asked, orders, strict=True)]
        told = _bits(self.reader, asked, kept, self.batch)
        sizes = tuple(float(one.bytes) for one in asked)
        metrics = []
        for name, bits in (("reader_gain", told), ("reader_gain_all", full), ("reader_gain_random", random)):
            gains = tuple(a - b for a, b in zip(none, bits, strict=True))
            metrics.append(Metric(name, sum(gains) / sum(sizes), "bits per byte", "higher", gains, sizes))
        tokens, of = (tuple(float(sum(map(len, rows))) for rows in lists) for lists in (kept, [one.ids for one in asked]))
        return [*metrics, Metric("reader_share", sum(tokens) / sum(of), "of the tokens", "lower", tokens, of)]


def best(one: Question, places: list[int], share: float) -> list[list[int]]:
    """Ids of the lines kept, in the order they had: each, from the best on, that the budget has room for."""
    left, kept = share * sum(map(len, one.ids)), []
    for place in places:
        if len(one.ids[place]) <= left:
            left -= len(one.ids[place])
            kept.append(place)
    return [one.ids[place] for place in sorted(kept)]


@cache
def _read(reader: str) -> Loaded:
    return load(reader)


@cache
def _prepared(reader: str, queries: int, passages: int, length: int, share: float, batch: int) -> tuple[Any, ...]:
    """The questions, and the bits of each without text, with all of it and with random lines: the same for all variants."""
    loaded, every, asked = _read(reader), functions(), []

    def ids(text: str) -> list[int]:
        return list(loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for query in held_out(queries):
        lines: list[str] = []
        for i in [i for i in candidates(query, passages + 1) if i != query][:passages]:
            some = [line for line in every[i].passage.split("\n") if line.strip()]
            ends = np.cumsum([len(ids(line + "\n")) for line in some])
            lines += [line for line, end in zip(some, ends, strict=True) if end <= CUT]
        target = encode(loaded.tokenizer, every[query].passage)
        told = slice(target.start, target.start + length)
        row = [ids(line + "\n") for line in lines]
        asked.append(
            Question(every[query].query, lines, row, ids(f"# {every[query].query}\n"), target.ids[told], int(target.bytes[told].sum()))
        )
    by_hash = [
        sorted(range(len(one.lines)), key=lambda i: hashlib.sha256(f"{i} {one.lines[i]}".encode(errors="surrogatepass")).digest())
        for one in asked
    ]
    random = [best(one, places, share) for one, places in zip(asked, by_hash, strict=True)]
    nothing: list[list[list[int]]] = [[] for _ in asked]
    return asked, *(_bits(reader, asked, kept, batch) for kept in (nothing, [one.ids for one in asked], random))


def _bits(reader: str, asked: list[Question], kept: list[list[list[int]]], batch: int) -> list[float]:
    """Of each function, after the lines kept and its question."""
    loaded = _read(reader)
    tokenizer, variant = loaded.tokenizer, Variant("the reader", loaded.model, loaded.tokenizer, folder=Path(reader))
    model = decoder(variant, "reader")
    start = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
    rows: list[list[int]] = [
        start + [i for line in lines for i in line] + one.before + one.after for one, lines in zip(asked, kept, strict=True)
    ]
    if max(map(len, rows)) > room(model, 1 << 30):
        raise SmeltError(
            f"reader: a question takes {max(map(len, rows))} of the {room(model, 1 << 30)} positions the reader has; take fewer passages"
        )
    counts = [len(one.after) for one in asked]
    scores = log_probabilities(variant, rows, batch=batch, prefill=64, chunk=64, last=counts)
    return [float(-score[len(score) - count :].sum()) / math.log(2) for score, count in zip(scores, counts, strict=True)]
