"""What every file of smelt may import: the paper record, the one error people see, and the nearest right name.

Standard library only, so that `smelt --help` and the registry start at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["FAMILIES", "Metric", "Paper", "SmeltError", "nearest"]

FAMILIES = (
    "data",
    "distill",
    "align",
    "weights",
    "attention",
    "cache",
    "decode",
    "rank",
    "evaluate",
    "parallel",
    "model",
)


@dataclass(frozen=True)
class Paper:
    """Where a method comes from. docs/methods.md, a run's citations and the model card are written from it."""

    title: str
    link: str  # "arXiv:2402.03898", a DOI or an address
    where: str = ""  # section, equation or algorithm

    @property
    def url(self) -> str:
        if self.link.startswith("arXiv:"):
            return "https://arxiv.org/abs/" + self.link.removeprefix("arXiv:")
        if self.link.startswith("doi:"):
            return "https://doi.org/" + self.link.removeprefix("doi:")
        return self.link


class Metric(NamedTuple):
    """One measured figure. `samples` are its parts in a fixed order (documents, queries, rounds), for paired ratios."""

    name: str
    value: float
    unit: str
    better: str  # "lower" or "higher"
    samples: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()  # value = sum(samples) / sum(weights) when given, else mean or median of samples


class SmeltError(Exception):
    """Something the person can mend. Printed as one line, `file:line: what is wrong`, exit code 2, no traceback."""

    def __init__(self, message: str, *, file: str | None = None, line: int | None = None):
        self.message, self.file, self.line = message, file, line
        super().__init__(str(self))

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}: " if self.file and self.line else f"{self.file}: " if self.file else ""
        line = where + " ".join(self.message.split())
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)  # no escape sequence reaches a terminal

    def at(self, file: str | None, line: int | None) -> SmeltError:
        """The same error with a place, unless it already has one."""
        return self if self.file else SmeltError(self.message, file=file, line=line)


def nearest(name: str, options: Iterable[str]) -> str:
    """`; did you mean 'taid'?`, or the whole list when nothing is near and the list is short."""
    options = sorted(options)
    close = difflib.get_close_matches(str(name)[:60].lower(), options, n=1, cutoff=0.6)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; there is {', '.join(options)}" if 0 < len(options) <= 12 else ""
