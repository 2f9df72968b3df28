"""Other token mixers in the place of a model's attention: linear attention, state spaces. They keep a state, not keys and values.

A `Converting` method says what stands where attention stood; `convert` puts it there and the result is a checkpoint
(`model/_swap.py`: config.json says "smelt"). A `Transferring` one is first taught to give what the attention gave,
layer by layer on the attention's own inputs (`smelt.train.convert`); its later stages are ordinary distill stages.
`MixerModule` has the plumbing between transformers' call and `mix`: where the state lies, how padding looks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from smelt.model._swap import Swapped, put
from smelt.model._walk import attention_of, blocks
from smelt.spec import SmeltError

__all__ = ["Converting", "MixerModule", "State", "Transferring", "convert", "place"]


class State(CacheLayerMixin):
    """What one layer keeps between calls: tensors by name, each with the batch first, and how many tokens it saw."""

    is_sliding = False
    is_croppable = False

    def __init__(self, beside: Sequence[Any] = ()) -> None:
        super().__init__()
        self.held: dict[str, Tensor] = {}
        self.seen = 0
        self.beside = beside  # the layers of the cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise SmeltError("this layer keeps a state and takes no keys and values")

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Where no layer keeps keys, a mask over the tokens before would be made for nobody: [t, seen + t] in every call."""
        if all(isinstance(layer, State) for layer in self.beside):
            return query_length, self.seen
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise SmeltError(
                "a state cannot go back to an earlier token; decoding that takes tokens back needs a model with keys and values"
            )

    def reset(self) -> None:
        self.held, self.seen, self.is_initialized = {}, 0, False

    def _batch(self, change: Callable[[Tensor], Tensor]) -> None:
        self.held = {name: change(value) for name, value in self.held.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._batch(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._batch(lambda rows: rows.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._batch(lambda rows: rows[indices])


class MixerModule(Swapped):
    """Stands for an attention module `self_attn` of a llama-like block; called as transformers calls that."""

    prefix: int = 1  # tokens at the start of a text that see each other; logits before the last of them are no predictions
    opens: ClassVar[bool] = True  # its projections may be factorized or adapted after it was put in

    def __init__(self, was: nn.Module):
        super().__init__()
        self.layer_idx: int = was.layer_idx  # type: ignore[assignment]

    @abstractmethod
    def mix(self, hidden: Tensor, angles: tuple[Tensor, Tensor], state: State | None, real: Tensor | None) -> Tensor:
        """hidden [b, t, D] -> [b, t, D]. angles (cos, sin), each [1 or b, t, head_dim], of these tokens' positions. With a state: go on
        from `state.held` (empty at first) and leave the new one there; without: the parallel form from nothing. real [b, t]
        bool, False where a token is padding that must leave no trace in the state, None where all are real."""

    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Tensor | None = None, past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        state = self._state(past_key_values) if past_key_values is not None else None
        out = self.mix(hidden_states, position_embeddings, state, _real(attention_mask, hidden_states.shape[1]))
        if state is not None:
            state.seen += hidden_states.shape[1]
        return out, None

    def _state(self, past: Any) -> State:
        """This layer's place in whatever cache came with the call; the cache's own empty layer gives way."""
        if len(past.layers) == self.layer_idx:
            past.layers.append(State(past.layers))
        held = past.layers[self.layer_idx]
        if not isinstance(held, State):
            if held.get_seq_length():
                raise SmeltError("a cache filled by another model cannot be used: this layer keeps a state instead of keys and values")
            held = past.layers[self.layer_idx] = State(past.layers)
        return held


def _real(mask: Tensor | None, tokens: int) -> Tensor | None:
    """[b, t] of the new tokens, from the mask of attention [b, 1, t, s]: the last one sees every real token."""
    if mask is None:
        return None
    last = mask[:, 0, -1, -tokens:]
    real = last if last.dtype == torch.bool else last == 0
    return None if bool(real.all()) else real


class Converting(ABC):
    """A stage `- attention: METHOD`, with or without a `train:` block as its subclass says."""

    module: ClassVar[type[MixerModule]]
    layers: tuple[int, ...] | None  # the last field of every method: which layers; None: all

    @abstractmethod
    def mixer(self, was: nn.Module, config: Any) -> MixerModule:
        """What stands for the attention module `was`. Weights it keeps are the very parameters of `was`, which goes on working; new
        ones are drawn from torch's generator. Raises SmeltError where shapes do not fit."""

    @abstractmethod
    def state_bytes(self, config: Any, tokens: int, batch: int = 1, itemsize: int = 4) -> int:
        """The accounting formula: bytes of the states of the converted layers after `tokens` tokens."""

    @classmethod
    @abstractmethod
    def example(cls) -> Self:
        """An instance for the family's laws: heads of 32, 64 tokens."""


class Transferring(Converting):
    transfers: ClassVar[bool] = True

    @abstractmethod
    def learned(self, module: Any) -> list[nn.Parameter]:
        """Those of a mixer's parameters that the transfer trains; the others stand still."""

    @abstractmethod
    def lost(self, module: Any, was: Any, hidden: Tensor, angles: tuple[Tensor, Tensor], progress: float) -> Tensor:
        """[b, t] float32: how far the mixer is from the attention `was` on that attention's own input hidden [b, t, D].
        `progress` in [0, 1) is the share of the steps done."""


def convert(model: Any, method: Converting) -> dict[int, tuple[nn.Module, MixerModule]]:
    """{layer: (attention, mixer)} of the layers the method asks for; `place` puts the mixers in."""
    every = list(blocks(model))
    config = model.config.get_text_config(decoder=True)
    wanted = range(len(every)) if method.layers is None else method.layers
    found: dict[int, tuple[nn.Module, MixerModule]] = {}
    for index in wanted:
        if not 0 <= index < len(every):
            raise SmeltError(f"attention: layer {index} was asked for, and the model has {len(every)}, numbered from 0")
        was = attention_of(every[index])
        if isinstance(was, MixerModule):
            raise SmeltError(f"attention: layer {index} has been converted already")
        found[index] = was, method.mixer(was, config)
    return found


def place(model: Any, made: dict[int, tuple[nn.Module, MixerModule]]) -> None:
    names = {module: name for name, module in model.named_modules()}
    for was, mixer in made.values():
        put(model, names[was], mixer.to(next(model.parameters()).device))
