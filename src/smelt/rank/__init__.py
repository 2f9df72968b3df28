"""Judges order a few passages with one reading of a model; strategies say which passages a judge reads; retrievers search a corpus.

`_order.order(method, asked, model)` asks either: windows of many queries that can be read at the same moment become one
batch, and what is no permutation is refused. A strategy never sees a model, so its laws need none. `model` is a
`smelt.model._load.Loaded` (model, tokenizer, folder), or None for judges that need none. `_training.Learns`: judges that
a rank stage with a `train:` block trains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from smelt.rank._verb import callable_module

__all__ = ["Answer", "Asked", "Embedder", "Judge", "Retriever", "Rounds", "Scoring", "Strategy"]


class Asked(NamedTuple):
    query: str
    passages: list[str]  # at least one


class Answer(NamedTuple):
    order: list[int]  # of the places in the window, best first
    scores: Tensor | None  # [window], of a judge that scores


Rounds = Generator[list[list[int]], list[Answer], list[int]]


class Judge(ABC):
    comparable: ClassVar[bool] = False  # scores of different calls may be compared
    limit: ClassVar[int | None] = None  # passages one call can take, None when only the model's context bounds them

    @abstractmethod
    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        """Of each, a permutation of range(len(passages)), best first. A batch is read at once as far as memory allows. Asked
        nothing, it raises SmeltError where `model` is none that it can read with."""


class Scoring(Judge):
    """Sorted by numbers; equal ones keep the order given. `_order.sort` makes the answers."""

    @abstractmethod
    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        """Of each [n], float32 or float64 on CPU, larger is better. Raises SmeltError where one is not finite."""


class Retriever(Scoring):
    """A passage's score depends on the others through counts of the corpus at most, so a whole corpus can be searched."""

    @abstractmethod
    def index(self, passages: Sequence[str], model: Any) -> Any: ...

    @abstractmethod
    def search(self, index: Any, queries: Sequence[str], k: int, model: Any) -> list[list[tuple[int, float]]]:
        """Of each query the k best (place in the corpus, score), falling, equal scores in the corpus's order."""


class Embedder(Retriever):
    """score(q, d) = <embed(q), embed(d)>. `_vectors.Dense` has index, search and scores for all of them."""

    @abstractmethod
    def embed(self, texts: Sequence[str], model: Any, query: bool = False) -> Tensor:
        """[n, width] float32 on CPU. `query`: these texts ask, they are not what is searched."""


class Strategy(ABC):
    judge: Judge
    compares: ClassVar[bool] = False  # scores of different calls: the judge must be `comparable`

    @abstractmethod
    def rounds(self, n: int) -> Rounds:
        """Yields windows (lists of places out of range(n)) that can be read at the same moment, is sent an Answer to each,
        in order, and returns the order of all. n = 0 yields nothing."""

    @abstractmethod
    def calls(self, n: int) -> int: ...  # windows in all, exactly
    @abstractmethod
    def chain(self, n: int) -> int: ...  # rounds: calls that have to wait for each other
    @abstractmethod
    def exact_top(self, n: int) -> int: ...  # places at the top that a judge sorting by one fixed score gets right


callable_module(__name__)
