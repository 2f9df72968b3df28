"""Tiny random models and a tiny tokenizer, in memory, for tests and dry runs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from smelt.model.mistral import byte_level_bpe
from smelt.spec import SmeltError, nearest

__all__ = ["ARCHITECTURES", "tiny", "tiny_tokenizer"]

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "bert")


def tiny(
    architecture: str = "llama",
    *,
    layers: int = 2,
    hidden: int = 64,
    ffn: int = 96,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 320,
    context: int = 256,
    seed: int = 0,
    **more: Any,
) -> Any:
    """A random float32 model in eval mode. Weights are scaled up so that its outputs differ clearly by input."""
    if architecture not in ARCHITECTURES:
        raise SmeltError(f"no tiny architecture '{architecture}'{nearest(architecture, ARCHITECTURES)}")
    sizes: dict[str, Any] = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": context,
        "initializer_range": 0.1,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if architecture != "bert":
        sizes |= {"num_key_value_heads": kv_heads, "tie_word_embeddings": True}
    if architecture in ("llama", "mistral", "qwen3", "gemma", "gemma2"):
        sizes["head_dim"] = hidden // heads
    if architecture == "mistral":
        sizes["sliding_window"] = None
    config = CONFIG_MAPPING[architecture](**(sizes | more))
    auto = AutoModel if architecture == "bert" else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return auto.from_config(config).eval()


@cache
def tiny_tokenizer(vocab: int = 320, context: int = 256) -> Any:
    """A byte-level BPE trained on a few lines of code."""
    lines = ["def f(x):\n    return x + 1\n", "import os\nfor name in os.listdir('.'):\n    print(name)\n", "class A:\n    pass\n"]
    return byte_level_bpe(lines * 4, vocab, context)
