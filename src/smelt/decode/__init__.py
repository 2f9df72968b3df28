"""Decoding methods: fewer or cheaper calls of the model for the same or nearly the same text.

A method turns into keyword arguments of transformers' `generate` (`prompt_lookup_num_tokens`, `assistant_model`,
`logits_processor`, `custom_generate=`): `arguments(model, tokenizer)` may load a draft model and is asked once when
the method is bound; it leaves `model` as it was. Acceptance is defined once for all files: tokens per call = new
tokens / forward calls of the target, prefill included (`_count.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

__all__ = ["Decoding"]


class Decoding(ABC):
    lossless: ClassVar[bool] = False  # greedy output identical token for token, sampled output the target's distribution
    crops: ClassVar[bool] = False  # takes back rejected tokens, so the cache must be croppable

    @abstractmethod
    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def example(cls, draft: Path) -> Self:
        """An instance for the family's laws. `draft` is a small checkpoint with the target's tokenizer, for those that need one."""
