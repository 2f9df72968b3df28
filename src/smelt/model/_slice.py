"""Cut a decoder down to some of its layers, channels, heads and neurons, as a plain model of the same architecture.

Which axis of which matrix is a channel, a head or a neuron is written here and nowhere else. Only architectures whose
every parameter is known are accepted, and every size is checked, so nothing is cut along the wrong axis in silence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from smelt.model._walk import blocks, parts
from smelt.spec import SmeltError, nearest

__all__ = ["KNOWN", "Keep", "everything", "head_input", "norms", "resized", "sliced"]

KNOWN = ("gemma", "gemma2", "llama", "mistral", "phi3", "qwen2", "qwen3")
ONE_PLUS = ("gemma", "gemma2")  # RMSNorm multiplies by 1 + weight, and the embedding by sqrt(hidden)

# axes of weight; a bias has the first. d channels, f neurons, q query heads, k key/value heads; "q+k+k" is stacked.
AXES = {
    "embed_tokens": ("", "d"),
    "lm_head": ("", "d"),
    "q_proj": ("q", "d"),
    "k_proj": ("k", "d"),
    "v_proj": ("k", "d"),
    "qkv_proj": ("q+k+k", "d"),
    "o_proj": ("d", "q"),
    "gate_proj": ("f", "d"),
    "up_proj": ("f", "d"),
    "gate_up_proj": ("f+f", "d"),
    "down_proj": ("d", "f"),
    "q_norm": ("",),
    "k_norm": ("",),
    "norm": ("d",),
    "input_layernorm": ("d",),
    "post_attention_layernorm": ("d",),
    "pre_feedforward_layernorm": ("d",),
    "post_feedforward_layernorm": ("d",),
}


@dataclass
class Keep:
    """Indices that stay, in rising order. Heads and neurons per layer of the *old* model; equal counts in all kept layers."""

    layers: list[int]
    channels: Tensor  # [hidden]
    queries: list[Tensor]  # per old layer [heads]
    groups: list[Tensor]  # per old layer [kv_heads]
    neurons: list[Tensor]  # per old layer [ffn]


def everything(model: Any) -> Keep:
    """The cut that leaves all. Raises SmeltError for architectures that are not known."""
    known(model.config)
    sizes = parts(model.config)
    each = range(sizes.layers)
    return Keep(
        list(each),
        torch.arange(sizes.hidden),
        [torch.arange(sizes.heads) for _ in each],
        [torch.arange(sizes.kv_heads) for _ in each],
        [torch.arange(sizes.ffn) for _ in each],
    )


def known(config: Any) -> None:
    if config.model_type not in KNOWN:
        raise SmeltError(f"the shapes of '{config.model_type}' models cannot be cut{nearest(config.model_type, KNOWN)}")
    if getattr(config, "quantization_config", None) is not None:
        raise SmeltError("a quantized model cannot be cut; cut it first, then quantize")


def resized(config: Any, layers: list[int], hidden: int, heads: int, kv_heads: int, ffn: int) -> Any:
    """The configuration after the cut. head_dim stays, so it is written down where it was implied before."""
    known(config)
    new = copy.deepcopy(config)
    new.head_dim = parts(config).head_dim
    new.num_hidden_layers, new.hidden_size, new.intermediate_size = len(layers), hidden, ffn
    new.num_attention_heads, new.num_key_value_heads = heads, kv_heads
    types = getattr(config, "layer_types", None)
    if types is not None:
        new.layer_types = [types[i] for i in layers]
    return new


def norms(model: Any) -> list[tuple[str, nn.Module]]:
    """(name, module) of every norm over the channels: in the blocks, and the last one."""
    return [(name, m) for name, m in model.named_modules() if AXES.get(name.rpartition(".")[2]) == ("d",)]


def head_input(block: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """The maps whose inputs are the heads' outputs, side by side, and the neurons' activations."""
    return block.self_attn.o_proj, block.mlp.down_proj  # type: ignore[union-attr,return-value]


@torch.no_grad()
def sliced(model: Any, keep: Keep) -> Any:
    """A new model holding the kept parts.

    The gain of every norm over channels is multiplied by sqrt(old / new): exact when the channels cut carried nothing,
    as the root mean square of the others is larger by just that. Gemma multiplies its embedding by sqrt(hidden), so
    there the kept columns are multiplied by sqrt(old / new) too, and the last norm is left alone where head and
    embedding are one matrix.
    """
    old, first = parts(model.config), keep.layers[0]
    heads, groups, neurons = (len(kept[first]) for kept in (keep.queries, keep.groups, keep.neurons))
    config = resized(model.config, keep.layers, len(keep.channels), heads, groups, neurons)
    with torch.random.fork_rng(devices=[]):
        made = type(model)._from_config(config, dtype=model.dtype, attn_implementation=model.config._attn_implementation)
    source = dict(model.named_parameters(remove_duplicate=False))
    for name in source:
        if name.split(".")[-2] not in AXES:
            raise SmeltError(f"'{name}' is a parameter whose axes are not known, so it cannot be cut")
    number = {f"layers.{new}.": f"layers.{at}." for new, at in enumerate(keep.layers)}
    plus = float(config.model_type in ONE_PLUS)
    widen = (old.hidden / len(keep.channels)) ** 0.5
    tied = bool(config.tie_word_embeddings)
    for name, target in made.named_parameters():
        before, layer = name, 0
        for new, at in number.items():
            if new in name:
                before, layer = name.replace(new, at), int(at.split(".")[1])
        value = _cut(before, source[before], keep, layer, old)
        owner = before.rpartition(".")[0]
        if owner.endswith("embed_tokens") and plus:
            value = value * widen
        elif AXES[owner.rpartition(".")[2]] == ("d",) and not (plus and tied and owner.endswith(".norm")):
            value = (value + plus) * widen - plus
        if value.shape != target.shape:
            raise SmeltError(f"'{name}' would have shape {tuple(value.shape)} where the model expects {tuple(target.shape)}")
        target.copy_(value)
    made.tie_weights()
    if getattr(model, "generation_config", None) is not None:
        made.generation_config = copy.deepcopy(model.generation_config)
    for index, block in enumerate(blocks(made)):
        assert block.self_attn.layer_idx == index  # type: ignore[union-attr]
    return made.to(model.device).train(model.training)


def _cut(name: str, value: Tensor, keep: Keep, layer: int, old: Any) -> Tensor:
    for dim, axis in enumerate(AXES[name.split(".")[-2]][: value.dim()]):
        if not axis:
            continue
        index, size = [], 0
        for part in axis.split("+"):
            kept, total = _axis(part, keep, layer, old)
            index.append(kept + size)
            size += total
        if value.shape[dim] != size:
            raise SmeltError(f"'{name}' has {value.shape[dim]} entries along an axis of {size}; this model is put together otherwise")
        value = value.index_select(dim, torch.cat(index).to(value.device))
    return value


def _axis(part: str, keep: Keep, layer: int, old: Any) -> tuple[Tensor, int]:
    """(kept positions, old size) of one axis."""
    if part == "d":
        return keep.channels, old.hidden
    if part == "f":
        return keep.neurons[layer], old.ffn
    heads, count = (keep.queries[layer], old.heads) if part == "q" else (keep.groups[layer], old.kv_heads)
    within = torch.arange(old.head_dim)
    return (heads[:, None] * old.head_dim + within).flatten(), count * old.head_dim
