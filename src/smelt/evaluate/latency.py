"""How fast a variant reads a prompt and writes an answer."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

import torch
from annotated_types import Ge
from transformers import StoppingCriteria

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder
from smelt.evaluate._text import prompt, room
from smelt.model._walk import blocks
from smelt.runtime import new_cache
from smelt.spec import Paper, SmeltError

__all__ = ["Latency"]


@dataclass(frozen=True)
class Latency(Probe):
    """prefill = prompt tokens / s of one call; first_token_s; decode = tokens after the first round / their seconds.

    One round, batch 1, greedy, `new` tokens after a prompt of `prompt` tokens of held-out text (shortened to what
    fits the model's context), through `model.generate` with whatever is bound. The end of text is suppressed, so
    every variant makes exactly `new` tokens. first_token_s runs from the call of generate to the end of its first
    round; the decode rate leaves that round out. Rounds are seen by a stopping criterion that never stops.

    tokens_per_call = new tokens / calls of the model, the prompt's included; 1 for plain decoding. A call is one
    run through the last block: a draft model is not counted, nor a draft that leaves the last blocks out.

    Times are for this machine and moment: compare by the ratios of rounds taken in turns. Raises SmeltError when
    `new` leaves no room for a prompt, or when generation ends early.
    """

    paired: ClassVar[bool] = True
    paper: ClassVar = Paper("Efficiently Scaling Transformer Inference", "arXiv:2211.05102", "prefill and decode latency")
    prompt: Annotated[int, Ge(1)] = 512
    new: Annotated[int, Ge(2)] = 64

    @classmethod
    def example(cls) -> Self:
        return cls(prompt=24, new=8)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "latency")
        count = room(model, self.prompt + self.new) - self.new
        if count < 1:
            raise SmeltError(f"latency: new={self.new} leaves no room for a prompt in a context of {room(model, 1 << 30)}")
        ids = torch.tensor([prompt(variant, count)], device=model.device)
        options = {"do_sample": False, "pad_token_id": variant.tokenizer.pad_token_id}
        few = ids[:, :8]  # so that a draft loaded a moment ago is not met cold
        model.generate(few, attention_mask=torch.ones_like(few), max_new_tokens=2, min_new_tokens=2, **options)
        began = _now(model)
        with torch.no_grad():
            cache = None if variant.cache is None else new_cache(model, variant.cache)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        prefill = _now(model) - began
        del cache
        calls: list[int] = []
        handle = blocks(model)[-1].register_forward_hook(lambda *_: calls.append(1))
        rounds = _Rounds(model)
        try:
            began = _now(model)
            made = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.new,
                min_new_tokens=self.new,
                **options,
                stopping_criteria=[rounds],
            )
            ended = _now(model)
        finally:
            handle.remove()
        new = made.shape[1] - count
        if new != self.new or not rounds.seen:
            raise SmeltError(f"latency: '{variant.name}' made {new} tokens where {self.new} were asked for, in {len(rounds.seen)} rounds")
        first_at, first_length = rounds.seen[0]
        late = new - (first_length - count)
        rate = late / (ended - first_at) if late > 0 else new / (ended - began)
        return [
            Metric("prefill_tokens_per_s", count / prefill, "tokens/s", "higher"),
            Metric("first_token_s", first_at - began, "s", "lower"),
            Metric("decode_tokens_per_s", rate, "tokens/s", "higher"),
            Metric("tokens_per_call", new / max(1, len(calls)), "tokens", "higher"),
        ]


class _Rounds(StoppingCriteria):
    """When each round of generation ended, and how long the text was then."""

    def __init__(self, model: Any):
        self.model = model
        self.seen: list[tuple[float, int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append((_now(self.model), input_ids.shape[1]))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
