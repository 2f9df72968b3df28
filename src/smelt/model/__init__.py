"""New models, and the only place that knows how architectures are put together.

A method of this family makes a model: `mistral(layers=8, hidden=256)` a new one with a tokenizer trained on a
corpus, `embedded()` the small trained one that comes with smelt. Loading, saving and walking over layers are in the
helpers `_load.py` and `_walk.py`; everything else in smelt asks them and never names an architecture.
"""

from __future__ import annotations

from typing import Protocol

from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

__all__ = ["Source"]


class Source(Protocol):
    """Makes a model and its tokenizer. The same settings and seed make the same weights, bit for bit."""

    def config(self) -> PretrainedConfig:
        """The sizes alone, for the preflight."""
        ...

    def create(self, seed: int) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]: ...
