"""Keys and values of a model on calibration text: seen where they enter a cache, changed there if need be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.cache_utils import Cache, CacheLayerMixin

__all__ = ["Tap", "slopes", "still", "taps"]

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Tap(CacheLayerMixin):
    """A cache layer for one call. `keys` and `values` [b, h, t, d], rotated, are what `update` handed to attention."""

    is_croppable = False
    is_sliding = False

    def __init__(self, change: Change | None = None) -> None:
        super().__init__()
        self.change = change

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert not self.is_initialized, "a tap is for one call"
        self.lazy_initialization(key_states, value_states)
        if self.change is not None:
            key_states, value_states = self.change(key_states, value_states)
        elif torch.is_grad_enabled() and not key_states.requires_grad:  # a model whose weights are frozen
            key_states, value_states = key_states.requires_grad_(), value_states.requires_grad_()
        self.keys, self.values, self.tokens = key_states, value_states, key_states.shape[2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.tokens if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("a tap is for one call")


def taps(model: Any, change: Callable[[int], Change] | None = None) -> Any:
    """A cache of taps for one call of the model; `change(index)` gives each layer's."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    return Cache(layers=[Tap(change(index) if change else None) for index in range(count)])


@contextmanager
def still(model: Any) -> Iterator[None]:
    """In evaluation mode, and back to what it was; no gradients left behind."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)


def slopes(model: Any, ids: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Of each layer: keys and values on ids [b, t], and the gradients of the mean loss (nats per token) with respect to them.

    The weights get no gradients. One forward and one backward pass.
    """
    with torch.enable_grad():
        logits = model(input_ids=ids, past_key_values=(cache := taps(model)), use_cache=True).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())
        rows = [rows for tap in cache.layers for rows in (tap.keys, tap.values)]
        found = torch.autograd.grad(loss, rows)
    for i in range(0, len(rows), 2):
        yield rows[i].detach(), rows[i + 1].detach(), found[i], found[i + 1]
