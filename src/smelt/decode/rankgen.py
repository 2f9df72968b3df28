"""Beam search over sampled continuations, ranked by how well they follow from the prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.utils import GenerateDecoderOnlyOutput

from smelt.decode import Decoding
from smelt.decode._rule import drawn
from smelt.decode._scorer import Judge, Scorer, information, judged, likelihood, similarity
from smelt.decode._verify import Choice
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
    """What `generate` takes as custom_generate. A streamer comes as `follower`: transformers hands custom loops none."""

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        follower: Any = None,
        **kwargs: Any,
    ) -> Any:
        config, cache, mask = generation_config, kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if config.num_beams and config.num_beams > 1:
            raise SmeltError("rankgen keeps beams of its own; set num_beams=1")
        if not kwargs.get("use_cache", True):
            raise SmeltError("rankgen needs the key/value cache; leave use_cache on")
        asked = [name for name in ("attentions", "hidden_states", "logits", "scores") if getattr(config, f"output_{name}", None)]
        if asked:
            raise SmeltError(f"rankgen: output_{asked[0]} is not kept; leave it out")
        if cache is not None and cache.get_seq_length() and (len(input_ids) > 1 or (mask is not None and not bool(mask.bool().all()))):
            raise SmeltError("a cache that has read text already can be continued for one row without padding only")
        choice, made = Choice(logits_processor or [], bool(config.do_sample)), []
        for at, row in enumerate(input_ids):
            keep = mask[at].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(row, dtype=torch.bool)
            one = cache if len(input_ids) == 1 else copy.deepcopy(cache)
            text = _Row(model, choice, stopping_criteria, one, row, row[keep[-len(row) :]].tolist(), follower)
            made.append(text.write(scorer, beam, samples if choice.sample else 1, step))
        longest = max(map(len, made))
        pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        fill = torch.tensor([new + [pad] * (longest - len(new)) for new in made], dtype=input_ids.dtype, device=input_ids.device)
        sequences: Any = torch.cat([input_ids, fill.view(len(made), -1)], 1)
        if follower is not None:
            follower.end()
        return GenerateDecoderOnlyOutput(sequences=sequences) if config.return_dict_in_generate else sequences

    return decode


class _Row:
    """One prompt while its beams are written."""

    def __init__(self, model: Any, choice: Choice, criteria: Any, cache: Any, prompt: Tensor, text: list[int], streamer: Any):
        self.model, self.choice, self.cache, self.prompt, self.text = model, choice, cache, prompt, text
        self.streamer, self.criteria, self.batch = streamer, criteria or [], 0
        self.ends = {token for one in self.criteria if isinstance(one, EosTokenCriteria) for token in one.eos_token_id.tolist()}
        self.most = min((one.max_length - len(prompt) for one in self.criteria if isinstance(one, MaxLengthCriteria)), default=1 << 62)
        self.others = [one for one in self.criteria if not isinstance(one, (EosTokenCriteria, MaxLengthCriteria))]

    def write(self, scorer: Scorer, beam: int, samples: int, step: int) -> list[int]:
        beams, shown = [_Beam([])], 0
        while any(one.writes for one in beams):
            beams = [replace(one, new=list(one.new)) for one in beams for _ in range(samples if one.writes else 1)]
            for _ in range(step):
                active = [one for one in beams if one.writes]
                if active:
                    self._extend(active)
            if len(beams) > 1:
                scores = scorer(self.text, [one.new for one in beams])
                if scores.isnan().any():
                    raise SmeltError("rankgen: a score is not a number")
                beams = [beams[at] for at in scores.argsort(descending=True, stable=True)[:beam].tolist()]
            agreed = beams[0].new if not any(one.writes for one in beams) else _common([one.new for one in beams])
            if self.streamer is not None and len(agreed) > shown:
                self.streamer.put(torch.tensor(agreed[shown:]))
                shown = len(agreed)
        return beams[0].new

    def _extend(self, active: list[_Beam]) -> None:
        """One more token for each."""
        rows = [one.row for one in active]
        if not self.batch:
            known = self.cache.get_seq_length() if self.cache is not None else 0
            ids = torch.tensor([self.text[known:]], device=self.prompt.device)
        else:
            if rows != list(range(self.batch)):
                self.cache.batch_select_indices(torch.tensor(rows, device=self.prompt.device))
            ids = torch.tensor([[one.new[-1]] for one in active], device=self.prompt.device)
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, return_dict=True)
        logits, self.cache = out.logits[:, -1].expand(len(active), -1), out.past_key_values
        if self.batch:
            for at, one in enumerate(active):
                one.row = at
        self.batch = len(active) if self.batch else 1  # the prompt's call has one row, which all share
        scores = self.choice.scores([self.text + one.new for one in active], logits)
        tokens = drawn(scores.softmax(-1)) if self.choice.sample else scores.argmax(-1)
        for one, token in zip(active, tokens.tolist(), strict=True):
            one.new.append(token)
            one.writes = not (token in self.ends or len(one.new) >= self.most or self._says_stop(one))

    def _says_stop(self, one: _Beam) -> bool:
        if not self.others:
            return False
        ids = torch.cat([self.prompt, torch.tensor(one.new, device=self.prompt.device)])[None]
        return any(bool(rule(ids, None).all()) for rule in self.others)


def _common(texts: list[list[int]]) -> list[int]:
    """Their longest common beginning, which is that of the first and the last in order."""
    low, high = min(texts), max(texts)
    return low[: next((i for i, (a, b) in enumerate(zip(low, high)) if a != b), len(low))]
