"""Lists to learn ranking from: a query, passages, and a grade of each.

Rows of a JSONL file are one of

    {"query": "...", "passages": ["...", ...], "grades": [3, 0, ...]}
    {"query": "...", "positive": "..." or [...], "negatives": ["...", ...]}        grades 1 and 0
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from smelt.data import Lists, PairFiles
from smelt.spec import SmeltError, nearest

__all__ = ["Row", "lists_of", "read_lists"]

KEYS = ("query", "passages", "grades", "positive", "negatives")


class Row(NamedTuple):
    query: str
    passages: list[str]
    grades: list[float]  # larger is better; passages stand in falling order of grade


def lists_of(corpus: Any, seed: int, otherwise: Lists) -> list[Row]:
    """Every list of the train split, shuffled by `seed`: the corpus's own, those in its JSONL files, or those `otherwise` has."""
    files = corpus.rows_of_pairs() if isinstance(corpus, PairFiles) else []
    if isinstance(corpus, Lists):
        rows = [Row(*row) for row in corpus.lists("train")]
    elif files:
        rows = [row for file in files for row in read_lists(file)]
    else:
        rows = [Row(*row) for row in otherwise.lists("train")]
    if not rows:
        raise SmeltError("train: there is no list to learn from: a query with a relevant passage and at least one other")
    random.Random(hashlib.sha256(f"lists {seed}".encode()).digest()).shuffle(rows)
    return rows


def read_lists(file: Path) -> Iterator[Row]:
    """Raises SmeltError with the number of a line it cannot use."""
    try:
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _row(line, str(file), number)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise SmeltError(f"cannot be read: {reason}", file=str(file)) from None


def _row(line: str, file: str, number: int) -> Row:
    def wrong(what: str) -> SmeltError:
        return SmeltError(what, file=file, line=number)

    try:
        row = json.loads(line)
    except ValueError as error:
        raise wrong(f"not JSON: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("query"), str):
        near = nearest("query", row) if isinstance(row, dict) else ""
        raise wrong(f"a row is {{query, passages, grades}} or {{query, positive, negatives}}, and this one has no text 'query'{near}")
    if "passages" in row:
        passages, grades = row["passages"], row.get("grades")
        if not isinstance(grades, list) or not all(type(g) in (int, float) for g in grades):
            raise wrong("'grades' is a list with one number for each passage")
        if not isinstance(passages, list) or len(passages) != len(grades):
            raise wrong(f"'passages' and 'grades' are lists of one length; there are {len(grades)} grades")
    else:
        good, bad = row.get("positive"), row.get("negatives")
        good = [good] if isinstance(good, str) else good
        if not isinstance(good, list) or not isinstance(bad, list):
            raise wrong("'positive' is a text or a list of texts, 'negatives' a list of texts")
        passages, grades = [*good, *bad], [1.0] * len(good) + [0.0] * len(bad)
    if not all(isinstance(p, str) for p in passages):
        raise wrong("every passage is a text")
    if len(passages) < 2 or len({float(g) for g in grades}) < 2:
        raise wrong("a list needs two passages with different grades, or there is nothing to learn from it")
    by = sorted(range(len(passages)), key=lambda i: -float(grades[i]))
    return Row(row["query"], [passages[i] for i in by], [float(grades[i]) for i in by])
