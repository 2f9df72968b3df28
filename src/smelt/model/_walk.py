"""Walk over the parts of a decoder without naming its architecture anywhere else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from smelt.spec import SmeltError

__all__ = ["Parts", "attention_of", "blocks", "linears", "mlp_of", "parts", "projections_of", "stack"]


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


def linears(model: nn.Module) -> Iterator[tuple[int, str, nn.Linear]]:
    """(layer, full name, module) of every linear map inside the blocks, in order of computation's layers.

    Embeddings and the language head are not among them. Layers count by number (2 before 10).
    """
    owner = stack(model)
    prefix = next(name for name, module in model.named_modules() if module is owner)
    for index, block in enumerate(blocks(model)):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear):
                yield index, ".".join(x for x in (prefix, _listing(owner), str(index), name) if x), module
