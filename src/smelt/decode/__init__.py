"""Decoding methods: fewer or cheaper calls of the model for the same or nearly the same text.

A method turns into keyword arguments of transformers' `generate` (`prompt_lookup_num_tokens`, `assistant_model`,
`logits_processor`, `custom_generate=`): `arguments(model, tokenizer)` may load a draft model and is asked once when
the method is bound; it leaves `model` as it was. Acceptance is defined once for all files: tokens per call = new
tokens / forward calls of the target, prefill included (`_count.py`).

`_verify.Drafting`: the lossless ones. They only say what they draft; one loop verifies chains and trees.
`Steered`: those that change what the model says (another output, other states) by hooks, for the length of the bind:
probes of quality see them as generation does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

__all__ = ["Decoding", "Steered"]


class Decoding(ABC):
    lossless: ClassVar[bool] = False  # greedy output identical token for token, sampled output the target's distribution
    crops: ClassVar[bool] = False  # takes back rejected tokens, so the cache must be croppable

    @abstractmethod
    def arguments(self, model: Any, tokenizer: Any) -> dict[str, Any]: ...

    @classmethod
    @abstractmethod
    def example(cls, draft: Path) -> Self:
        """An instance for the family's laws. `draft` is a small checkpoint with the target's tokenizer, for those that need one."""


class Steered(Decoding):
    @abstractmethod
    def attach(self, model: Any, tokenizer: Any) -> AbstractContextManager[Any]:
        """Hooks on `model`, on when entered and off again when left, the model then as it was, bit for bit. What has to be
        fitted first (a direction, a datastore) is fitted here, before any hook is on, from the method's own fields."""
