"""Two models write one text: the small one while it is sure, the large one where it is not."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor

from smelt.decode import Decoding
from smelt.decode._given import corpus_of, rows_of
from smelt.decode._loop import Row, Written, looped
from smelt.decode._partner import partner
from smelt.decode._rule import drawn
from smelt.spec import Paper

__all__ = ["EntropySwitch"]


@dataclass(frozen=True)
class EntropySwitch(Decoding):
    """writer = large if mean of the writer's last w H > tau else small, H = -sum p log2 p; no switch within `least` tokens.

    H in bits, of the softmax before any logits processor. The bound model is the large one, `small` names the other and
    writes first. `threshold` is tau of both; None: each model's own tau (entropies of two models are not on one scale),
    the `quantile` of the mean of w entropies over `tokens` tokens of `data` (None: the standard library), read when bound.
    What greedy search writes has lower entropy than given text, so the large model writes a smaller share than 1 - quantile.

    Each model has its own cache and reads what it missed in one call when it takes over; the other does not run. Cost
    per text: tokens(large) calls of the large model, tokens(small) of the small one, and each reads every position up to
    its last token once. So tokens per call of the large model = 1 / its share of the tokens. Rows of a batch are
    written one after the other, each without its padding. Memory: both models and both caches.

    Lossy by design: nothing is verified. threshold=inf is the small model's own text; below 0 with least=1 the large
    model writes all but the first token. On the embedded model with its own 3-bit version as the small one, read along 2,500
    tokens of held-out text, shares of .29, .49 and .67 closed .23, .48 and .71 of the gap between both: no better than
    switching at random, for a partner that errs everywhere a little. The paper's gain needs one that fails where it is unsure.

    Raises SmeltError for a small model that is no decoder, has another tokenizer or another number of output tokens,
    for beams, without a key/value cache, and when quantiles are to be measured without text.

    Differs from the paper: `quantile`. Reconstruction: least=10, the small model writes first, fewer than w entropies are
    averaged as they are, and a switch forgets those of the other model.
    """

    paper: ClassVar = Paper("Entropy Adaptive Decoding: Dynamic Model Switching for Efficient Inference", "arXiv:2502.06833", "the switch")
    small: str = "embedded"  # a folder, a hub id, "embedded" or an earlier variant of the recipe
    threshold: float | None = None  # tau, bits
    quantile: Annotated[float, Ge(0), Le(1)] = 0.75
    window: Annotated[int, Ge(1)] = 5  # w
    least: Annotated[int, Ge(1)] = 10  # tokens
    data: Any = None  # a corpus, or text as after `data:` in a recipe; read when threshold is None
    tokens: Annotated[int, Ge(2)] = 8192

    def __post_init__(self) -> None:
        corpus_of(self.data, "entropy_switch")

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        small = partner("entropy_switch:", self.small, model, tokenizer)
        taus = (self.threshold, self.threshold) if self.threshold is not None else self.measured(small, model, tokenizer)
        return {"custom_generate": switched(small, lambda: Switch(taus, self.window, self.least))}

    @torch.no_grad()
    def measured(self, small: Any, large: Any, tokenizer: Any) -> tuple[float, float]:
        """The quantile of (small, large)."""
        rows = list(rows_of(self.data, large, tokenizer, self.tokens, "entropy_switch"))
        taus = []
        for model in (small, large):
            means = []
            for ids in rows:
                found = entropy(model(input_ids=ids, use_cache=False).logits[0])
                means.append(found.unfold(0, min(self.window, len(found)), 1).mean(-1))
            taus.append(float(torch.cat(means).quantile(self.quantile)))
        return taus[0], taus[1]

    @classmethod
    def example(cls, draft: Path) -> EntropySwitch:
        return cls(small=str(draft), threshold=4.0, least=2)


def entropy(logits: Tensor) -> Tensor:
    """-sum p log2 p of each row [..., V], float64, bits."""
    return torch.special.entr(logits.double().softmax(-1)).sum(-1) / math.log(2)


class Switch:
    """Who writes the next token of one text. `taus` of the small and the large model."""

    def __init__(self, taus: tuple[float, float], window: int, least: int):
        self.taus, self.least = taus, least
        self.large, self.since = False, 0
        self.seen: deque[float] = deque(maxlen=window)

    def wrote(self, bits: float) -> None:
        """The writer's entropy where it wrote a token."""
        self.seen.append(bits)
        self.since += 1
        large = sum(self.seen) / len(self.seen) > self.taus[self.large]
        if self.since >= self.least and large != self.large:
            self.large, self.since = large, 0
            self.seen.clear()


class Reader:
    """A model and what its cache has read of a text."""

    def __init__(self, model: Any, cache: Any):
        self.model, self.cache = model, cache
        self.read = cache.get_seq_length() if cache is not None else 0

    def next(self, text: list[int]) -> Tensor:
        """Logits [1, V] after `text`; reads what is new in one call."""
        ids = torch.tensor([text[self.read :]], device=self.model.device)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True)
        self.cache, self.read = out.past_key_values, len(text)
        return out.logits[0, -1:]


def switched(small: Any, start: Callable[[], Switch]) -> Callable[..., Any]:
    """What `generate` takes as custom_generate."""

    def write(model: Any, row: Row) -> Written:
        large = Reader(model, row.cache)
        readers, switch = (Reader(small, None), large), start()
        new: list[int] = []
        kept: list[Tensor] = []
        while True:
            logits = readers[switch.large].next(row.text + new)
            scores = row.choice.scores([row.text + new], logits)
            new.append(int(drawn(scores.softmax(-1))) if row.choice.sample else int(scores.argmax()))
            kept += [scores] * row.scored
            row.show(new[-1:])
            if row.over(new):
                return Written(new, large.cache, kept)
            switch.wrote(float(entropy(logits)))

    return looped("entropy_switch", write)
