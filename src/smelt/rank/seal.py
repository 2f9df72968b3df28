"""Retrieval by writing: a language model writes n-grams that occur in the corpus, and documents are worth what is written of them."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Interval
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from smelt.rank import Answer, Asked, Retriever
from smelt.rank._fm_index import FMIndex, Key, Ngram, beam_search, intersective, largest, odds
from smelt.rank._order import sort
from smelt.rank._reading import TOKENS, at_once, batches, needs_decoder, room
from smelt.rank._training import Labelled, Learns
from smelt.rank._vectors import Row, around, pad, shortened
from smelt.rank.pointwise import Pointwise
from smelt.spec import Paper, SmeltError

__all__ = ["SEAL"]


@dataclass(frozen=True)
class SEAL(Retriever, Learns):
    """score(q, d) = sum over n-grams n written for q and found in d of w(n, q)^alpha cover(n), w = max(0, logit p(n | q) - logit p(n)).

    p(n | q) is the model's probability of n after `opening`, the query and `bridge`; p(n) = (count + 5) / (tokens + 5).
    n are all prefixes of a beam search (`beams`, `length` tokens) that takes only tokens after which the n-gram still
    occurs, and the query's own phrases of up to `phrases` words that occur. The heaviest come first and a place counts
    once; cover = 1 - beta + beta |new types| / |types|. What stays free adds w of its single tokens, of the `unigrams`
    most likely ones (`_fm_index.intersective`). `score="lm"` is max_n w(n, q) instead.

    The mask chooses and never renormalises: log p(n | q) are sums of the model's own log-probabilities, so no second
    reading is needed. Counts are those of the corpus; as a judge that is the window, whose scores do not compare with
    another's. There p(n) is high: in windows of 10 functions an untrained embedded model left 338 of 400 scores at 0, which
    keep the order given. `search` over a corpus is what it is made for. Scores float64; texts without a key 0.

    Trained (paper: BART): -log p of `spans` n-grams of `length` tokens of the first passage after the query, per token,
    labels smoothed by 0.1, spans drawn in proportion to exp(3 s), s the overlap of character trigrams with the query.

    Cost: per query a prefill and `length` - 1 steps of `beams` rows, whatever the corpus, one forward over its phrases;
    28 bytes of index a token. Raises SmeltError for a model that is no decoder and for logits that are not finite.

    Differs from the paper: no titles (passages have none); beams are kept by unrenormalised probabilities; which of a
    key's occurrences are taken, and the similarity that draws spans, are reconstructions.
    """

    paper: ClassVar = Paper("Autoregressive Search Engines: Generating Substrings as Document Identifiers", "arXiv:2204.10628", "section 3")
    beams: Annotated[int, Ge(1)] = 15
    length: Annotated[int, Ge(1)] = 10  # tokens of an n-gram, at most
    phrases: Annotated[int, Ge(0)] = 3  # words of a phrase of the query, at most
    score: Literal["intersective", "lm"] = "intersective"
    alpha: Annotated[float, Gt(0)] = 2.0
    beta: Annotated[float, Interval(ge=0, le=1)] = 0.8
    unigrams: Annotated[int, Ge(0)] = 5000
    opening: str = ""
    bridge: str = "\n"
    query_length: Annotated[int, Ge(1)] = 64  # tokens of a query that are read, and words that phrases are made of
    spans: Annotated[int, Ge(1)] = 4  # of a passage, in training
    labels: Any = None  # judge or strategy that the teacher grades lists with; only which passage is first counts
    weights: Any = None  # not read: there are no parameters beside the model's

    def heads(self, config: Any) -> nn.Module | None:
        return None

    def answers(self, asked: Sequence[Asked], model: Any) -> list[Answer]:
        return sort(self.scores(asked, model))

    def scores(self, asked: Sequence[Asked], model: Any) -> list[Tensor]:
        found = self._scores([self.index(a.passages, model) for a in asked], [a.query for a in asked], model)
        return [torch.from_numpy(one) for one in found]

    def index(self, passages: Sequence[str], model: Any) -> FMIndex:
        needs_decoder(model, "seal")
        return FMIndex(_plain(model.tokenizer, passages))

    def search(self, index: FMIndex, queries: Sequence[str], k: int, model: Any) -> list[list[tuple[int, float]]]:
        found = self._scores([index] * len(queries), queries, model)
        return [[(int(i), float(s[i])) for i in np.argsort(-s, kind="stable")[: max(0, k)]] for s in found]

    def _scores(self, indexes: Sequence[FMIndex], queries: Sequence[str], model: Any) -> list[np.ndarray]:
        needs_decoder(model, "seal")
        found, some = [np.zeros(index.documents) for index in indexes], [i for i, index in enumerate(indexes) if index.tokens]
        written = self.written([indexes[i] for i in some], [queries[i] for i in some], model) if some else []
        for i, (said, first) in zip(some, written, strict=True):
            index, ranges = indexes[i], {n: indexes[i].range(n) for n in said}
            keys = [Key(n, odds(p, hi - lo, index.tokens), lo, hi) for (n, p), (lo, hi) in zip(said.items(), ranges.values(), strict=True)]
            keys = [key for key in keys if key.weight > 0]
            found[i] = (
                largest(index, keys) if self.score == "lm" else intersective(index, keys, self._single(index, first), self.alpha, self.beta)
            )
        return found

    def _single(self, index: FMIndex, first: np.ndarray) -> np.ndarray:
        """[vocabulary] weights of single tokens, of the most likely ones."""
        _, tokens, lo, hi = index.continuations(np.zeros(1, np.int64), np.full(1, index.size))
        best = np.argsort(-first[tokens], kind="stable")[: self.unigrams]
        single = np.zeros(len(first))
        single[tokens[best]] = [odds(float(first[t]), int(n), index.tokens) for t, n in zip(tokens[best], (hi - lo)[best], strict=True)]
        return single

    @torch.no_grad()
    def written(self, indexes: Sequence[FMIndex], queries: Sequence[str], model: Any) -> list[tuple[dict[Ngram, float], np.ndarray]]:
        """Of each query {n-gram: log p(n | q)}, all of which occur in its index, and log p of the first token [vocabulary]."""
        if room(model) < self.length + 2:
            raise SmeltError(f"seal: the model reads {room(model)} tokens; n-grams of length={self.length} need {self.length + 2}")
        prompts = self.prompts(queries, model, room(model) - self.length)
        found: list[Any] = [None] * len(prompts)
        for group in batches([self.beams * (len(p) + self.length) for p in prompts], TOKENS):
            said = beam_search([indexes[q] for q in group], [prompts[q] for q in group], model.model, self.beams, self.length)
            for q, one in zip(group, said, strict=True):
                found[q] = one
        rows, whose, judge = [], [], Pointwise()
        for q, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            for ngram in self._phrases(query, model.tokenizer):
                lo, hi = indexes[q].range(ngram)
                if lo < hi and ngram not in found[q][0] and len(prompt) + len(ngram) <= room(model):
                    rows.append(Row([*prompt, *ngram], len(prompt), len(prompt) + len(ngram)))
                    whose.append(q)
        budget = max(1, min(at_once(model), (1 << 27) // model.model.config.get_text_config().vocab_size))  # for the logits
        for batch in batches([len(row.ids) for row in rows], budget):
            ids, mask = (x.to(model.model.device) for x in pad([rows[r] for r in batch]))
            for r, mean in zip(batch, judge.marks(model.model, ids, mask, ids, ids).tolist(), strict=True):
                found[whose[r]][0][tuple(rows[r].ids[rows[r].first :])] = mean * (rows[r].stop - rows[r].first)
        return found

    def prompts(self, queries: Sequence[str], model: Any, most: int) -> list[list[int]]:
        tokenizer = model.tokenizer
        start = around(tokenizer)[0] or [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None][:1]
        before, after = _plain(tokenizer, [self.opening, self.bridge])
        left = min(self.query_length, most - len(start) - len(before) - len(after))
        made = [start + before + query[: max(0, left)] + after for query in _plain(tokenizer, queries)]
        return [ids[-most:] or [0] for ids in made]

    def _phrases(self, query: str, tokenizer: Any) -> list[Ngram]:
        words = query.split()[: self.query_length]
        said = {" ".join(words[at : at + n]) for n in range(1, self.phrases + 1) for at in range(len(words) - n + 1)}
        cases = sorted({space + case for text in said for case in (text, text.lower(), text.capitalize()) for space in ("", " ")})
        return sorted({tuple(ids) for ids in _plain(tokenizer, cases) if ids})

    def collate(self, lists: Sequence[Labelled], model: Any, context: int) -> dict[str, Tensor]:
        """ids, mask [b spans, t]; the tokens of mask 2 are learned."""
        needs_decoder(model, "seal")
        most = min(room(model), shortened(1 << 30, context, self.spans))
        prompts = self.prompts([one.query for one in lists], model, max(1, most - self.length))
        rows = []
        for one, prompt, passage in zip(lists, prompts, _plain(model.tokenizer, [one.passages[0] for one in lists]), strict=True):
            spans = [passage[at : at + self.length] for at in range(max(1, len(passage) - self.length + 1))]
            texts, draw = model.tokenizer.batch_decode(spans), random.Random(hashlib.sha256(f"{one.turn} {one.query}".encode()).digest())
            for span in draw.choices(spans, [math.exp(3 * overlap(text, one.query)) for text in texts], k=self.spans):
                rows.append(Row(prompt + span, len(prompt), len(prompt) + len(span)))
        return dict(zip(("ids", "mask"), pad(rows), strict=True))

    def loss(self, model: Any, heads: Any, batch: dict[str, Tensor]) -> Tensor:
        ids, inside = batch["ids"], batch["mask"][:, 1:] > 1
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        each = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none", label_smoothing=0.1) * inside
        return each.view(-1, self.spans, each.shape[1]).sum((1, 2)) / inside.view(-1, self.spans, each.shape[1]).sum((1, 2)).clamp(min=1)


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def overlap(a: str, b: str) -> float:
    """Share of character trigrams that two texts have in common (Dice), 0 to 1."""
    one, two = (Counter(text[i : i + 3] for i in range(len(text) - 2)) for text in (a.lower(), b.lower()))
    return 2 * (one & two).total() / max(1, one.total() + two.total())
