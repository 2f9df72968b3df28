"""Bytes the cache really holds after a text, beside the method's formula and a full fp16 cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import torch
from annotated_types import Ge
from transformers import DynamicCache

from smelt.evaluate import Metric, Probe, Variant
from smelt.evaluate._score import decoder
from smelt.evaluate._text import prompt, room
from smelt.model._walk import parts
from smelt.runtime import cache_bytes, new_cache
from smelt.spec import Paper, SmeltError

__all__ = ["CacheSize"]


@dataclass(frozen=True)
class CacheSize(Probe):
    """cache_share_of_fp16 = cache_held_bytes / (2 L H d n 2): storages reachable from the cache over a full fp16 cache of n tokens.

    n = `tokens` + `written`: a prompt of held-out text in one call, then tokens one by one, batch 1. Every storage counts once, with
    room kept ready. cache_formula_bytes is what the method's `bytes_held` says (the full cache's own formula where none is bound):
    equal to what is held, or one of them is wrong. The probe `memory` has the same bytes per token of a prompt, and no formula.

    `tokens` gives way to the model's context less `written`; beyond=True reads on all the same, because bytes do not depend on
    what the text is. Bytes are those of the model's own precision, so a full fp32 cache has the share 2.
    Cost: n forward positions. Raises SmeltError for a model without next tokens, or a `written` as long as the context.
    """

    paper: ClassVar = Paper("Efficiently Scaling Transformer Inference", "arXiv:2211.05102", "memory costs")
    tokens: Annotated[int, Ge(1)] = 1024
    written: Annotated[int, Ge(0)] = 16
    beyond: bool = False

    @classmethod
    def example(cls) -> Self:
        return cls(tokens=60, written=3)

    def __call__(self, variant: Variant) -> list[Metric]:
        model = decoder(variant, "cache_size")
        count = self.tokens + self.written if self.beyond else room(model, self.tokens + self.written)
        read = count - self.written
        if read < 1:
            raise SmeltError(f"cache_size: written={self.written} leaves no room for a prompt in a context of {count}")
        ids = torch.tensor([prompt(variant, count)], device=model.device)
        cache = DynamicCache(config=model.config) if variant.cache is None else new_cache(model, variant.cache)
        with torch.no_grad():
            for low, high in [(0, read), *((at, at + 1) for at in range(read, count))]:
                model(input_ids=ids[:, low:high], past_key_values=cache, use_cache=True, logits_to_keep=1)
        config = model.config.get_text_config(decoder=True)
        sizes = parts(config)
        full = 2 * sizes.layers * sizes.kv_heads * sizes.head_dim * count  # elements
        formula = (
            full * model.dtype.itemsize
            if variant.cache is None
            else variant.cache.bytes_held(config, read, self.written, model.dtype.itemsize)
        )
        held = cache_bytes(cache)
        return [
            Metric("cache_held_bytes", float(held), "bytes", "lower"),
            Metric("cache_formula_bytes", float(formula), "bytes", "lower"),
            Metric("cache_share_of_fp16", held / (2 * full), "of an fp16 cache", "lower"),
        ]
