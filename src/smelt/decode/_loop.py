"""What every loop of our own around a model has in common: transformers' `custom_generate`, row by row.

`generate` prepares processors, criteria and a cache; a loop writes one row at a time, without its padding, and says what it
wrote. Rows of a batch do not see each other: a text comes out the same alone and in company. Beams of generate's own, no
cache, and outputs that a loop does not keep are refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import EosTokenCriteria, MaxLengthCriteria
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.utils import GenerateDecoderOnlyOutput

from smelt.spec import SmeltError

__all__ = ["Choice", "Row", "Written", "looped"]

FREE = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)  # look at no text before the token


class Choice:
    """How the next token is chosen: the logits processors of this call of generate, and whether it is drawn."""

    def __init__(self, processors: Sequence[Any], sample: bool, before: Sequence[int] = ()):
        self.processors, self.sample = list(processors), sample
        self.before = list(before)  # the padding of the prompt: some processors count the tokens of a padded row
        self.free = all(isinstance(p, FREE) for p in self.processors)

    def scores(self, texts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
        """Processed logits, float32 [m, V]; row i follows texts[i]."""
        scores = logits.float()
        if not self.processors:
            return scores
        if self.free:
            ids = torch.zeros(len(scores), 1, dtype=torch.long, device=scores.device)
            return _through(self.processors, ids, scores)
        rows = []
        for text, row in zip(texts, scores, strict=True):
            rows.append(_through(self.processors, torch.tensor([[*self.before, *text]], device=scores.device), row[None]))
        return torch.cat(rows)


def _through(processors: Sequence[Any], ids: Tensor, scores: Tensor) -> Tensor:
    for processor in processors:
        scores = processor(ids, scores)
    return scores


def _of_row(processor: Any, at: int) -> Any:
    """A processor as one row sees it: a repetition penalty knows the padding of every row of the batch."""
    lengths = getattr(processor, "prompt_ignore_length", None)
    if not isinstance(processor, RepetitionPenaltyLogitsProcessor) or not isinstance(lengths, Tensor):
        return processor
    own = copy.copy(processor)
    own.prompt_ignore_length = lengths[at : at + 1]
    return own


@dataclass
class Row:
    """One prompt of a call of generate, and what ends its text."""

    prompt: Tensor  # [n], with its padding
    text: list[int]  # without
    cache: Any  # of its own
    choice: Choice
    scored: bool  # keep the scores
    ends: set[int]
    room: int  # new tokens, at most
    others: list[Any]  # criteria that look at the whole text
    follower: Any  # a streamer

    def stops(self, new: Sequence[int]) -> bool:
        """Does a criterion other than an end token and the length stop it here."""
        if not self.others:
            return False
        ids = torch.cat([self.prompt, torch.tensor(new, dtype=self.prompt.dtype, device=self.prompt.device)])[None]
        return any(bool(rule(ids, None).all()) for rule in self.others)

    def over(self, new: Sequence[int]) -> bool:
        """Is the text over with its last new token."""
        return new[-1] in self.ends or len(new) >= self.room or self.stops(new)

    def show(self, tokens: Sequence[int]) -> None:
        if self.follower is not None:
            for token in tokens:
                self.follower.put(torch.tensor([token]))


@dataclass
class Written:
    """What became of a row: its new tokens, its cache afterwards (None: not to be continued), one row of scores [1, V] per token."""

    new: list[int]
    cache: Any = None
    scores: list[Tensor] = field(default_factory=list)
    about: Any = None  # for `result`


def looped(
    name: str,
    write: Callable[[Any, Row], Written],
    *,
    scores: bool = True,
    refuse: Callable[[Any], None] = lambda config: None,
    result: Callable[[Tensor, list[Written], Any], Any] | None = None,
) -> Callable[..., Any]:
    """What `generate` takes as custom_generate. `scores`: are they kept; `result(sequences, rows, config)` makes what is
    returned where it is more than that. A streamer comes as `follower`: transformers hands custom loops none."""

    def decode(
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        follower: Any = None,
        **kwargs: Any,
    ) -> Any:
        config = generation_config
        if config.num_beams and config.num_beams > 1:
            raise SmeltError(f"{name} cannot be combined with beam search; set num_beams=1")
        if not kwargs.get("use_cache", True):
            raise SmeltError(f"{name} needs the key/value cache; leave use_cache on")
        unkept = ("output_attentions", "output_hidden_states", "output_logits", *(() if scores else ("output_scores",)))
        for asked in unkept:
            if getattr(config, asked, None):
                raise SmeltError(f"{name}: {asked} is not kept{'; output_scores is' if scores else ''}")
        refuse(config)
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        seen = cache.get_seq_length() if cache is not None else 0
        if seen and (len(input_ids) > 1 or (mask is not None and not bool(mask.bool().all()))):
            raise SmeltError("a cache that has read text already can be continued for one row without padding only")
        processors = list(logits_processor or [])
        ends: set[int] = set()
        longest, others = 1 << 62, []
        for rule in stopping_criteria or []:
            if isinstance(rule, EosTokenCriteria):
                ends |= set(rule.eos_token_id.tolist())
            elif isinstance(rule, MaxLengthCriteria):
                longest = min(longest, rule.max_length)
            else:
                others.append(rule)
        scored = bool(config.return_dict_in_generate and getattr(config, "output_scores", None))
        rows: list[Written] = []
        for at, prompt in enumerate(input_ids):
            keep = mask[at].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else torch.ones_like(prompt, dtype=torch.bool)
            own = cache if len(input_ids) == 1 else copy.deepcopy(cache)
            keep = keep[-len(prompt) :]
            text = prompt[keep].tolist()
            choice = Choice([_of_row(one, at) for one in processors], bool(config.do_sample), prompt[~keep].tolist())
            rows.append(write(model, Row(prompt, text, own, choice, scored, ends, longest - len(prompt), others, follower)))
        if follower is not None:
            follower.end()
        most = max(len(row.new) for row in rows)
        pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
        fill = [row.new + [pad] * (most - len(row.new)) for row in rows]
        sequences = torch.cat([input_ids, input_ids.new_tensor(fill).view(len(rows), -1)], 1)
        if result is not None:
            return result(sequences, rows, config)
        if not config.return_dict_in_generate:
            return sequences
        made: dict[str, Any] = {"sequences": sequences}
        if len(rows) == 1:
            made |= {"past_key_values": rows[0].cache, "scores": tuple(rows[0].scores) if scored else None}
        return GenerateDecoderOnlyOutput(**made)

    return decode
