"""Beam search over sampled continuations, ranked by how well they follow from the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge

from smelt.decode import Decoding
from smelt.decode._loop import Row, Written, looped
from smelt.decode._rule import drawn
from smelt.decode._scorer import Judge, Scorer, information, judged, likelihood, similarity
from smelt.model._load import load, same_tokenizer
from smelt.spec import Paper, SmeltError

__all__ = ["RankGen"]


@dataclass(frozen=True)
class RankGen(Decoding):
    """B <- the `beam` best of {b + c : b in B, c one of `samples` draws of `step` tokens} by score(prompt, all text so far).

    c comes from the model's law after the logits processors of the call (the paper: top_p=0.9). A text that has ended stays
    among the candidates as it is. Of equal scores the earlier one stays, so where a scorer cannot tell, the law is
    unchanged; beam=1 and samples=1 is plain sampling, draw for draw. Of the last candidates the best is the answer.

    scorer="pmi": ln p(s | x) - ln p(s), s the text so far, x the prompt, and no x but the start token in the second
    term; "likelihood": ln p(s | x) / |s|; "embedding": the cosine of x and s under the encoder `model`, states averaged;
    in Python also a function (x, texts) -> scores. The first two ask `model`, or when it is "" the bound model itself, for its
    raw law. Greedy search has nothing to choose from: it is plain greedy search. Rows of a batch are written one by one.

    Cost per token: one call of the model over beam * samples rows; per `step` tokens their cache rows are copied and each
    candidate is read by the scorer once with the prompt (pmi: and once without). A streamer sees what all beams agree on.

    Raises SmeltError for "embedding" without a model or with one that has no padding token, "pmi" without a start token, a
    scoring model with another tokenizer, scores that are not one number each, beams or outputs of `generate`'s own.

    Differs from the paper: its scorer is a trained T5 of two towers whose dot product is the score. "pmi" stands in for it
    (reconstruction): training on true against other continuations makes such a score estimate the mutual information.
    Among four places of one held-out module "pmi" of the embedded model found the true continuation in 70 of 82 cases,
    "likelihood" in 58. The gain claimed for text written with the trained scorer is not claimed for either.
    """

    paper: ClassVar = Paper("RankGen: Improving Text Generation with Large Ranking Models", "arXiv:2205.09726", "section 3.3, beam search")
    beam: Annotated[int, Ge(1)] = 2
    samples: Annotated[int, Ge(1)] = 10  # of each beam
    step: Annotated[int, Ge(1)] = 20  # tokens between two rankings
    scorer: Literal["pmi", "likelihood", "embedding"] | Callable[[str, list[str]], Any] = "pmi"
    model: str = ""  # a folder, a hub id or "embedded"; "": the bound model

    def __post_init__(self) -> None:
        if self.scorer == "embedding" and not self.model:
            raise SmeltError("rankgen: scorer='embedding' needs model=, the folder of a sentence encoder")
        if callable(self.scorer) and self.model:
            raise SmeltError("rankgen: a function as scorer asks no model; leave model= out")

    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]:
        return {"custom_generate": ranked(self._scorer(model, tokenizer), self.beam, self.samples, self.step)}

    def _scorer(self, model: Any, tokenizer: Any) -> Scorer:
        if self.scorer == "likelihood" and not self.model:
            return likelihood(model)
        if tokenizer is None:
            raise SmeltError(f"rankgen: scorer={self.scorer!r} needs the model's tokenizer")
        if callable(self.scorer):
            judge: Judge = self.scorer
            return judged(judge, tokenizer)
        other = load(self.model, device=model.device) if self.model else None
        if self.scorer == "embedding":
            assert other is not None
            return similarity(other.model, other.tokenizer, tokenizer)
        if other is not None and not (other.model.can_generate() and same_tokenizer(tokenizer, other.tokenizer)):
            raise SmeltError(f"rankgen: '{self.model}' is no decoder with the model's own tokenizer, so it cannot tell how likely ids are")
        scoring = model if other is None else other.model
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if self.scorer == "pmi" and start is None:
            raise SmeltError("rankgen: 'pmi' needs a start token (bos or eos) for the text without its prompt; use scorer='likelihood'")
        return likelihood(scoring) if self.scorer == "likelihood" else information(scoring, start)

    @classmethod
    def example(cls, draft: Path) -> RankGen:
        return cls(beam=2, samples=2, step=3)


@dataclass
class _Beam:
    new: list[int]
    row: int = 0  # of the last call of the model
    writes: bool = True


def ranked(scorer: Scorer, beam: int, samples: int, step: int) -> Callable[..., Any]:
    """What `generate` takes as custom_generate."""

    def write(model: Any, row: Row) -> Written:
        return Written(_Text(model, row).write(scorer, beam, samples if row.choice.sample else 1, step))

    return looped("rankgen", write, scores=False)


class _Text:
    """One prompt while its beams are written."""

    def __init__(self, model: Any, row: Row):
        self.model, self.row, self.cache, self.batch = model, row, row.cache, 0

    def write(self, scorer: Scorer, beam: int, samples: int, step: int) -> list[int]:
        beams, shown = [_Beam([])], 0
        while any(one.writes for one in beams):
            beams = [replace(one, new=list(one.new)) for one in beams for _ in range(samples if one.writes else 1)]
            for _ in range(step):
                active = [one for one in beams if one.writes]
                if active:
                    self._extend(active)
            if len(beams) > 1:
                scores = scorer(self.row.text, [one.new for one in beams])
                if scores.isnan().any():
                    raise SmeltError("rankgen: a score is not a number")
                beams = [beams[at] for at in scores.argsort(descending=True, stable=True)[:beam].tolist()]
            agreed = beams[0].new if not any(one.writes for one in beams) else _common([one.new for one in beams])
            self.row.show(agreed[shown:])
            shown = max(shown, len(agreed))
        return beams[0].new

    def _extend(self, active: list[_Beam]) -> None:
        """One more token for each."""
        rows = [one.row for one in active]
        if not self.batch:
            known = self.cache.get_seq_length() if self.cache is not None else 0
            ids = torch.tensor([self.row.text[known:]], device=self.row.prompt.device)
        else:
            if rows != list(range(self.batch)):
                self.cache.batch_select_indices(torch.tensor(rows, device=self.row.prompt.device))
            ids = torch.tensor([[one.new[-1]] for one in active], device=self.row.prompt.device)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True)
        logits, self.cache = out.logits[:, -1].expand(len(active), -1), out.past_key_values
        if self.batch:
            for at, one in enumerate(active):
                one.row = at
        self.batch = len(active) if self.batch else 1  # the prompt's call has one row, which all share
        scores = self.row.choice.scores([self.row.text + one.new for one in active], logits)
        tokens = drawn(scores.softmax(-1)) if self.row.choice.sample else scores.argmax(-1)
        for one, token in zip(active, tokens.tolist(), strict=True):
            one.new.append(token)
            one.writes = not self.row.over(one.new)


def _common(texts: list[list[int]]) -> list[int]:
    """Their longest common beginning, which is that of the first and the last in order."""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))]
