"""Walk over the parts of a decoder without naming its architecture anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smelt.spec import SmeltError

__all__ = [
    "Fold",
    "Parts",
    "attention_of",
    "blocks",
    "fold",
    "folds",
    "linears",
    "mlp_of",
    "multiplied",
    "parts",
    "prefix_of",
    "projections_of",
    "stack",
]


class Parts(NamedTuple):
    """Sizes every llama-like configuration has."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int


def parts(config: Any) -> Parts:
    """Raises SmeltError for a configuration that lacks one of them (GPT-2 has no `intermediate_size`)."""
    try:
        heads = config.num_attention_heads
        return Parts(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.vocab_size,
            config.max_position_embeddings,
        )
    except AttributeError as error:
        raise SmeltError(f"{config.model_type}: its configuration has no '{error.name}'; smelt knows llama-like decoders") from error


def stack(model: nn.Module) -> nn.Module:
    """The module that holds the list of blocks (`model.model` of the llama-like)."""
    base = getattr(model, "base_model", model)
    for candidate in (base, getattr(base, "decoder", None), getattr(base, "encoder", None)):
        if candidate is not None and _listing(candidate):
            return candidate
    raise SmeltError(f"{type(model).__name__}: no list of layers found; smelt knows llama-like decoders and BERT-like encoders")


def blocks(model: nn.Module) -> nn.ModuleList:
    inner = stack(model)
    return getattr(inner, _listing(inner))


def _listing(module: nn.Module) -> str:
    """The name of its list of blocks: `layers` in decoders, `layer` in encoders."""
    return next((name for name in ("layers", "layer") if isinstance(getattr(module, name, None), nn.ModuleList)), "")


def attention_of(block: nn.Module) -> nn.Module:
    for name in ("self_attn", "attention", "attn"):
        found = getattr(block, name, None)
        if found is not None:
            return found
    raise SmeltError(f"{type(block).__name__}: no attention module found")


def projections_of(block: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The linear maps that make queries, keys and values. Raises SmeltError where they are one fused map (Phi-3)."""
    attention = attention_of(block)
    for owner in (attention, getattr(attention, "self", None)):
        for names in (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")):
            found = tuple(getattr(owner, name, None) for name in names)
            if all(isinstance(module, nn.Module) for module in found):
                return found  # type: ignore[return-value]
    raise SmeltError(f"{type(attention).__name__}: queries, keys and values are not three separate maps, so they cannot be read")


def mlp_of(block: nn.Module) -> nn.Module:
    found = getattr(block, "mlp", None)
    if found is None:
        raise SmeltError(f"{type(block).__name__}: no mlp module found")
    return found


def prefix_of(model: nn.Module) -> str:
    """What the full name of everything in block i begins with, without i: "model.layers." of the llama-like."""
    owner = stack(model)
    prefix = next(name for name, module in model.named_modules() if module is owner)
    return f"{prefix}.{_listing(owner)}." if prefix else f"{_listing(owner)}."


def linears(model: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """(layer, full name, module) of every linear map inside the blocks, in order of computation's layers.

    Embeddings and the language head are not among them. Layers count by number (2 before 10).
    """
    prefix = prefix_of(model)
    for index, block in enumerate(blocks(model)):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                yield index, f"{prefix}{index}.{name}", module


class Fold(NamedTuple):
    """A norm or linear map, and every map that reads those of its outputs, channel by channel."""

    source: nn.Module
    first: int  # the outputs read are those from here on
    readers: tuple[nn.Linear, ...]


def folds(block: nn.Module) -> list[Fold]:
    """Where a factor can move between a map's input and what comes before: norm -> q, k, v; norm -> gate, up; up -> down;
    v -> o where every query head has its own value head. Raises SmeltError for blocks that are put together otherwise."""
    attention, mlp = attention_of(block), mlp_of(block)
    into = _linear(attention, "q_proj", "k_proj", "v_proj") or _linear(attention, "qkv_proj")
    wide = _linear(mlp, "gate_proj", "up_proj") or _linear(mlp, "gate_up_proj")
    out, down = _linear(attention, "o_proj"), _linear(mlp, "down_proj")
    first = getattr(block, "input_layernorm", None)
    second = getattr(block, "pre_feedforward_layernorm", None) or getattr(block, "post_attention_layernorm", None)
    if not (into and wide and out and down and first is not None and second is not None):
        raise SmeltError(
            f"{type(block).__name__}: no norm before queries, keys and values and before a gated mlp; scales have no place to go"
        )
    found = [Fold(first, 0, into), Fold(second, 0, wide)]
    value, heads = into[-1].out_features, out[0].in_features
    if value == heads * (3 if len(into) == 1 else 1):
        found.append(Fold(into[-1], value - heads, out))
    found.append(Fold(wide[-1], wide[-1].out_features - down[0].in_features, down))
    return found


def _linear(owner: nn.Module, *names: str) -> tuple[nn.Linear, ...]:
    """Those linear maps, or none when one is missing."""
    found = tuple(module for name in names if isinstance(module := getattr(owner, name, None), nn.Linear))
    return found if len(found) == len(names) else ()


@torch.no_grad()
def fold(found: Fold, scale: Tensor) -> None:
    """Divide the source's outputs by `scale` [n] and multiply the columns that read them, in place: the function stays."""
    source, scale = found.source, scale.double()
    if isinstance(source, nn.Linear):
        for tensor in (source.weight, source.bias):
            if tensor is not None:
                part = tensor[found.first :]
                part.copy_(part.double() / scale.view(-1, *[1] * (part.dim() - 1)))
    else:
        gain: Any = source.weight
        gain.copy_(gain.double() / scale + _plus(source) * (1 / scale - 1))  # (gain + plus) / scale - plus, exact at scale 1
    for reader in found.readers:
        reader.weight.copy_(reader.weight.double() * scale)


def _plus(norm: nn.Module) -> int:
    """0 where a norm multiplies by its weight, 1 where it multiplies by 1 + its weight (Gemma): asked of the module itself."""
    gain: Any = norm.weight
    if getattr(norm, "bias", None) is None:
        made = norm(torch.ones(len(gain), device=gain.device))
        off = [(made - gain.float() - plus).abs().max().item() for plus in (0, 1)]
        if min(off) < 0.01 * (1 + gain.abs().max().item()):
            return off.index(min(off))
    raise SmeltError(f"{type(norm).__name__}: not a root-mean-square norm, so no scale can be folded into it")


def multiplied(model: Any) -> int:
    """Parameters that a token is multiplied with: all, but for an embedding that is only looked up (not the head too)."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    alone = head is None or head.weight is not table.weight
    return sum(p.numel() for p in model.parameters()) - (table.weight.numel() if alone else 0)
