"""Words that both have: the first stage that needs no model, and the line every ranker is held against."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import bm25s
import numpy
import regex
import torch
from annotated_types import Ge, Le
from torch import Tensor

from smelt.rank import Answer, Asked, Retriever
from smelt.rank._order import sort
from smelt.spec import Paper

__all__ = ["BM25"]

UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}ー\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
WORDS = {
    split: regex.compile(rf"(?V1)(?P<run>[{UNSPACED}]+)|\p{{Extended_Pictographic}}|" + word)
    for split, word in {
        "words": rf"[[\p{{L}}\p{{N}}\p{{M}}]--[{UNSPACED}]]+",
        "identifiers": rf"[[\p{{L}}\p{{M}}]--[{UNSPACED}]]+|\p{{N}}+",
    }.items()
}


@dataclass(frozen=True)
class BM25(Retriever):
    """score(q, d) = sum over w in q of ln(1 + (N - n_w + 0.5) / (n_w + 0.5)) f_wd / (f_wd + k1 (1 - b + b |d| / mean |d|)).

    f_wd counts word w in d, n_w the passages that have it, N all of them; a word that comes twice in q counts twice.
    Lucene's form: without the constant factor k1 + 1, and never below zero. `split="words"` takes runs of letters and
    digits, `"identifiers"` breaks these at case and digits as well (readHTTPHeader2 -> read http header 2). Lower case;
    no stemming and no stop words (their idf is near 0). Other scripts: NFKC, a letter with its marks is one; where words are not
    parted by spaces (Han, Kana, Thai, Lao, Khmer, Burmese) every two neighbours are a word; every pictograph is one.

    Rare words and the mean length are those of the corpus, so a score depends on the other passages. As a judge the
    corpus is the window itself: scores of different windows do not compare (`comparable` is False), and in a window of
    a few passages idf says little. `search` over a corpus is what it is made for. `model` is not read and may be None.
    Equal scores keep the order given; a passage without any of the words scores 0 and is listed after those that have one.

    Cost: the index holds one number per word and passage that has it; a query adds up as many rows of it as it has words.
    """

    paper: ClassVar = Paper(
        "The Probabilistic Relevance Framework: BM25 and Beyond", "doi:10.1561/1500000019", "section 3; by bm25s, arXiv:2407.03618"
    )
    k1: Annotated[float, Ge(0)] = 1.5  # how soon further mentions stop counting
    b: Annotated[float, Ge(0), Le(1)] = 0.75  # how much long passages pay
    split: Literal["words", "identifiers"] = "identifiers"

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        return [torch.from_numpy(self._scores(self.index(a.passages, model), a.query)) for a in asked]

    def index(self, passages: Sequence[str], model: Any) -> Any:
        """(passages, the index of bm25s or None where no passage has a word)."""
        words = [self.words(passage) for passage in passages]
        if not any(words):
            return len(passages), None
        made = bm25s.BM25(method="lucene", k1=self.k1, b=self.b)
        made.index(words, show_progress=False)
        return len(passages), made

    def search(self, index: Any, queries: Sequence[str], k: int, model: Any) -> list[list[tuple[int, float]]]:
        best = []
        for query in queries:
            scores = self._scores(index, query)
            places = numpy.lexsort((numpy.arange(len(scores)), -scores))[: max(0, k)]
            best.append(list(zip(places.tolist(), scores[places].tolist(), strict=True)))
        return best

    def _scores(self, index: Any, query: str) -> Any:
        n, made = index
        words = [word for word in self.words(query) if made is not None and word in made.vocab_dict]
        return made.get_scores(words).astype(numpy.float32) if words else numpy.zeros(n, dtype=numpy.float32)

    def words(self, text: str) -> list[str]:
        text = text if text.isascii() else unicodedata.normalize("NFKC", text)
        if self.split == "identifiers":
            text = re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", text)
        if text.isascii():
            return re.findall(r"[^\W_]+" if self.split == "words" else r"[^\W\d_]+|\d+", text.lower())
        found: list[str] = []
        for match in WORDS[self.split].finditer(text.lower()):
            letters = regex.findall(r"\X", match[0]) if match["run"] else [match[0]]
            found += map("".join, pairwise(letters)) if len(letters) > 1 else letters
        return found
