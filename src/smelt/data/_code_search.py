"""The retrieval task every machine has: find a function of the Python standard library by what its docstring says.

Query: the first sentence of the docstring. Passage: the source of the function without its docstring. One relevant
passage a query. Built once per process (about 4 s), so that the probe and the ranking methods share it.
"""

from __future__ import annotations

import ast
import hashlib
import math
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import bm25s
import numpy as np
from ir_measures import Qrel, ScoredDoc, iter_calc, nDCG

from smelt.data import SPLITS
from smelt.data.stdlib import Stdlib

__all__ = ["Function", "by_chance", "candidates", "first_sentence", "functions", "held_out", "ndcg", "split_identifiers"]

WORDS = 4  # of a query, at least: shorter sentences ("Constructor.") do not say which function is meant
STOP = {"a", "an", "and", "are", "as", "at", "be", "by", "for", "from", "has", "if", "in", "is", "it", "its", "not", "of", "on"}
STOP |= {"or", "that", "the", "this", "to", "was", "were", "will", "with"}


class Function(NamedTuple):
    name: str  # "path.py:line:name"
    split: str
    query: str  # the first sentence of its docstring
    passage: str
    more: tuple[str, ...] = ()  # the other sentences of it that say as much


@cache
def functions() -> tuple[Function, ...]:
    """Every documented function and method of the running interpreter's library, test split first, in file order."""
    return tuple(f for split in SPLITS[::-1] for d in Stdlib().documents(split) for f in documented(d.name, split, d.text))


def documented(name: str, split: str, text: str) -> Iterator[Function]:
    """Functions with a docstring of at least `WORDS` words in its first sentence and a body besides it."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a file kept for another Python, such as lib2to3 templates
        return
    lines = [line.encode("utf-8", "replace") for line in text.split("\n")]
    for node in statements(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and len(node.body) > 1:
            docstring = ast.get_docstring(node) or ""
            query = first_sentence(docstring)
            if says_enough(query):
                more = tuple(dict.fromkeys(s for s in sentences(docstring) if says_enough(s) and s != query))
                yield Function(f"{name}:{node.lineno}:{node.name}", split, query, without_docstring(lines, node), more)


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Those of `ast.walk`, in its order, without the expressions: no function is defined in one."""
    nodes = deque([tree])
    while nodes:
        yield (node := nodes.popleft())
        for field in ("body", "handlers", "orelse", "finalbody", "cases"):
            nodes.extend(getattr(node, field, ()))


def says_enough(sentence: str) -> bool:
    return len(re.findall("[A-Za-z]{2,}", sentence)) >= WORDS


def sentences(docstring: str) -> list[str]:
    """Of each paragraph, on one line, the parts up to a `.`, `!` or `?` that ends a word. No examples (`>>>`)."""
    paragraphs = [" ".join(part.split()) for part in docstring.strip().split("\n\n")]
    return [s for flat in paragraphs if not flat.startswith(">>>") for s in re.split(r"(?<=[.!?])\s+", flat)]


def first_sentence(docstring: str) -> str:
    """That of the first paragraph."""
    flat = " ".join(docstring.strip().split("\n\n")[0].split())
    end = re.search(r"[.!?](?=\s|$)", flat)
    return flat[: end.end()] if end else flat


def without_docstring(lines: Sequence[bytes], node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """The exact source segment of `node` less that of its first statement (columns of `ast` are UTF-8 bytes)."""
    doc = node.body[0]
    before = _segment(lines, node.lineno, node.col_offset, doc.lineno, doc.col_offset)
    after = _segment(lines, doc.end_lineno or 0, doc.end_col_offset or 0, node.end_lineno or 0, node.end_col_offset or 0)
    if after.lstrip(b" \t").startswith(b";"):  # def f(): "doc"; return 1
        after = b" " + after.lstrip(b" \t;")
    return (before.rstrip() + after).decode()


def _segment(lines: Sequence[bytes], first: int, start: int, last: int, stop: int) -> bytes:
    if first == last:
        return lines[first - 1][start:stop]
    return b"\n".join([lines[first - 1][start:], *lines[first : last - 1], lines[last - 1][:stop]])


@cache
def held_out(count: int = 500) -> tuple[int, ...]:
    """Indices of `count` functions to ask for, from modules no model was trained on, in the order of a hash.

    Test and validation modules first; training modules only when those do not suffice.
    """
    every = functions()
    order = sorted(range(len(every)), key=lambda i: (every[i].split == "train", hashlib.sha256(every[i].name.encode()).digest()))
    return tuple(order[:count])


def split_identifiers(text: str) -> list[str]:
    """Lower-case words of snake_case, camelCase and HTTPServer names; digits apart; no function words."""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)
    return [word for word in map(str.lower, words) if word not in STOP]


@cache
def _index() -> bm25s.BM25:
    index = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    index.index([split_identifiers(f.passage) for f in functions()], show_progress=False)
    return index


@cache
def candidates(query: int, count: int) -> tuple[int, ...]:
    """The first stage: indices of the `count` functions BM25 puts first for the query of function `query`."""
    words = [word for word in split_identifiers(functions()[query].query) if word in _index().vocab_dict]
    scores = _index().get_scores(words) if words else np.zeros(len(functions()))
    return tuple(int(i) for i in np.lexsort((np.arange(len(scores)), -scores))[:count])


def ndcg(orders: Mapping[int, Sequence[int]], cutoff: int = 10) -> list[float]:
    """nDCG@cutoff of each query of `orders` {query: functions, best first}, in its order. Range 0 to 1."""
    qrels = [Qrel(str(query), str(query), 1) for query in orders]
    run = [ScoredDoc(str(q), str(d), float(len(found) - at)) for q, found in orders.items() for at, d in enumerate(found)]
    values = {metric.query_id: metric.value for metric in iter_calc([nDCG @ cutoff], qrels, run)}
    return [float(values.get(str(query), 0.0)) for query in orders]


def by_chance(count: int, cutoff: int = 10) -> float:
    """Expected nDCG@cutoff of a random order of `count` passages that hold the relevant one."""
    return sum(1 / math.log2(place + 2) for place in range(min(count, cutoff))) / count
