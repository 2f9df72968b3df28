"""What a model wrote, read as an order. Whatever it wrote, the result is a permutation.

The steps, in this order: what follows the last `</think>`; digits of other scripts become ASCII; maximal runs of digits
are the identifiers; 1 is subtracted; repeats (the first stays), then what is out of range, are dropped; the missing
follow in the order they were given. With letters, those in brackets are read first, and capitals that stand alone
only where there is none in brackets (`AB` is not 12).

    with counting() as counts:
        order(SlidingWindow(judge=PermutationText()), asked, model)
    print(counts)  # Counter({'ok': 8, 'repetition': 1})
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["OUTCOMES", "count", "counting", "repair"]

OUTCOMES = ("ok", "wrong_format", "repetition", "missing")
FORM = {False: re.compile(r"\[[0-9]+\](?: > \[[0-9]+\])*"), True: re.compile(r"\[[A-Z]\](?: > \[[A-Z]\])*")}

_counts: ContextVar[Counter[str] | None] = ContextVar("counts", default=None)


@contextmanager
def counting() -> Iterator[Counter[str]]:
    """Counts, for the length of the block and in its thread, how the answers came out that were repaired in it.

    An inner block counts for itself only. Keys of OUTCOMES; a model most of whose answers are not `ok` ranks like its first stage.
    """
    counts: Counter[str] = Counter()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def count(outcome: str) -> None:
    held = _counts.get()
    if held is not None:
        held[outcome] += 1


def repair(text: str, n: int, letters: bool = False, strict: bool = False) -> tuple[list[int], str]:
    """(order, outcome): a permutation of range(n), best first, and how the text was found, one of OUTCOMES.

    `wrong_format` is anything but `[2] > [1] > ...`; then `missing` has too few identifiers, `repetition` too many or one
    twice (or, with the right number, one that does not exist); all of them are repaired. `strict` leaves the order given
    when fewer than n / 2 identifiers are found: digits out of a refusal are worse than none.
    """
    text = text.rpartition("</think>")[2].strip()
    found = _named(text, n, letters)
    places = [i for i in dict.fromkeys(found) if 0 <= i < n]
    if FORM[letters].fullmatch(text) is None:
        outcome = "wrong_format"
    elif len(found) < n:
        outcome = "missing"
    else:
        outcome = "ok" if len(found) == len(places) else "repetition"
    if strict and 2 * len(places) < n:
        places = []
    known = set(places)
    return places + [i for i in range(n) if i not in known], outcome


def _named(text: str, n: int, letters: bool) -> list[int]:
    """Identifiers in the order they are written, less 1; -1 and n are outside."""
    if letters:
        named = re.findall(r"\[([A-Z])\]", text) or re.findall(r"(?<![^\W_])[A-Z](?![^\W_])", text)
        return [ord(letter) - ord("A") for letter in named]
    text = "".join(c if c.isascii() else _digits(c) for c in text)
    runs = [run.lstrip("0") for run in re.findall(r"[0-9]+", text)]
    return [int(run or 0) - 1 if len(run) <= len(str(n)) else n for run in runs]  # int() refuses thousands of digits


def _digits(c: str) -> str:
    """ASCII for a digit of another script, raised, lowered or wide. A circled number is one number, whatever stands beside it."""
    decimal = unicodedata.decimal(c, None)
    if decimal is not None:
        return str(decimal)
    value = unicodedata.numeric(c, None)
    if value is None or value != int(value) or unicodedata.category(c) != "No":
        return c
    plain = unicodedata.decomposition(c).startswith(("<super>", "<sub>"))
    return str(int(value)) if plain else f" {int(value)} "
