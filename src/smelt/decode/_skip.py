"""Layers that some tokens do not run, for the length of a block. Their keys and values are written all the same.

A layer not run for a token hands its input on. Attention of later tokens still finds a key and a value of every token
in every layer: for a token that does not run layer l they are those projected from the state it carries there, as in
CALM (arXiv:2207.07061), so caches stay of equal length. Where no token of a call runs a layer, only its first norm and
the maps of keys and values run. Where some do, the whole layer runs for all and its result is kept for those: nothing
is saved, the outcome is the same. The layers' `forward` is set on the instances and restored.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from smelt.model._walk import attention_of, blocks, projections_of
from smelt.spec import SmeltError

__all__ = ["Policy", "Used", "inputs", "keys_values", "skipping"]


class Used:
    """How many tokens used each layer, apart for calls of several tokens ("prompt") and of one ("response").

    The token at position 0 does not count: its state is often of another size than all others. Padding counts.
    """

    def __init__(self, layers: int):
        self.ran = {phase: torch.zeros(layers, dtype=torch.float64) for phase in ("prompt", "response")}
        self.seen = {phase: torch.zeros(layers, dtype=torch.float64) for phase in ("prompt", "response")}

    def count(self, layer: int, active: Tensor, places: Tensor | None) -> None:
        """`active` bool [b, t], `places` the positions [b or 1, t]."""
        counted = torch.ones_like(active) if places is None else (places != 0).expand_as(active)
        phase = "prompt" if active.shape[1] > 1 else "response"
        self.ran[phase][layer] += float((active & counted).sum())
        self.seen[phase][layer] += float(counted.sum())

    def shares(self, phase: str | None = None) -> Tensor:
        """Share of tokens that used each layer, float64 [layers], of one phase or of both; 0 / 0 is nan."""
        phases = [phase] if phase else list(self.ran)
        return sum((self.ran[p] for p in phases), torch.zeros(())) / sum((self.seen[p] for p in phases), torch.zeros(()))


class Policy(ABC):
    """Which tokens run which layers. A call of the model begins with layer 0, then goes through all in order."""

    @abstractmethod
    def runs(self, layer: int, state: Tensor, places: Tensor | None) -> Tensor | None:
        """Which tokens run `layer`, bool [b, t]; its input `state` is [b, t, d]. None: all."""

    @abstractmethod
    def left(self, layer: int, state: Tensor, out: Tensor, places: Tensor | None) -> Tensor:
        """What goes on from `layer`, given its input and its output (the input for tokens that did not run it)."""


@contextmanager
def skipping(model: Any, policy: Policy) -> Iterator[None]:
    """Raises SmeltError for a model whose keys and values cannot be written without running its layers."""
    _tried(model)
    with ExitStack() as undo:
        for layer, block in enumerate(blocks(model)):
            held = vars(block)
            if "forward" in held:
                undo.callback(held.__setitem__, "forward", held["forward"])
            else:
                undo.callback(held.pop, "forward", None)
            held["forward"] = MethodType(_forward(layer, held.get("forward"), policy), block)
        yield


def _forward(layer: int, inner: Any, policy: Policy) -> Callable[..., Tensor]:
    """The `forward` of a block; it finds the block by its argument."""

    def forward(block: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = kwargs.get("position_ids")
        run = policy.runs(layer, hidden_states, places)
        if run is None or bool(run.any()):
            out = inner(hidden_states, *args, **kwargs) if inner is not None else type(block).forward(block, hidden_states, *args, **kwargs)
            if run is not None and not bool(run.all()):
                out = torch.where(run[..., None], out, hidden_states)
        else:
            out, past = hidden_states, kwargs.get("past_key_values")
            if past is not None:
                keys, values = keys_values(block, hidden_states, kwargs["position_embeddings"])
                past.update(keys, values, attention_of(block).layer_idx)
        return policy.left(layer, hidden_states, out, places)

    return forward


def keys_values(block: Any, state: Tensor, turn: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The keys (after the rotary embedding) and values [b, kv heads, t, head size] that a block makes of its input [b, t, d].

    Cost: 4 d kv_heads head_dim FLOPs a token. `turn` is (cos, sin) as the model hands them to its blocks.
    """
    attention: Any = attention_of(block)
    _, to_keys, to_values = projections_of(block)
    normed = block.input_layernorm(state)
    shape = (*state.shape[:-1], -1, attention.head_dim)
    keys, values = to_keys(normed).view(shape), to_values(normed).view(shape).transpose(1, 2)
    norm = getattr(attention, "k_norm", None)  # qwen3, gemma3
    keys = (keys if norm is None else norm(keys)).transpose(1, 2)
    rotated = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    return rotated(keys, keys, *turn)[1], values


@contextmanager
def inputs(model: Any) -> Iterator[list[tuple[Tensor, dict[str, Any], Tensor]]]:
    """(input, keyword arguments, output) of every block that runs, in order."""
    seen: list[tuple[Tensor, dict[str, Any], Tensor]] = []

    def after(_: Any, args: tuple, kwargs: dict[str, Any], out: Tensor) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], kwargs, out))

    handles = [block.register_forward_hook(after, with_kwargs=True) for block in blocks(model)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _tried(model: Any) -> None:
    """Reads two tokens and compares what `keys_values` makes with what the model wrote: architectures differ in small things."""
    cache: Any = DynamicCache(config=model.config.get_text_config(decoder=True))
    kind = model.config.model_type
    for block in blocks(model):
        projections_of(block)  # names what is fused
    with inputs(model) as seen:
        model(input_ids=torch.arange(2, device=model.device)[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
    try:
        for block, layer, (state, kwargs, _) in zip(blocks(model), cache.layers, seen, strict=True):
            made = keys_values(block, state, kwargs["position_embeddings"])
            if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(made, (layer.keys, layer.values), strict=True)):
                raise ValueError("they come out otherwise")
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise SmeltError(f"keys and values of {kind} models cannot be written without running their layers ({error})") from error
