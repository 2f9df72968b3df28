"""The helper smelt/model/_rotary.py, against what the models themselves do to their keys."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.spec import SmeltError

SCALED = {
    "default": {"rope_type": "default", "rope_theta": 5e4},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_keys_in_the_cache_come_back_to_what_the_projection_gave_and_forth_again(architecture):
    model = tiny(architecture)
    config, ids = model.config, torch.randint(2, 300, (2, 20))
    first = model.base_model.layers[0].self_attn
    seen = []
    norm = getattr(first, "k_norm", None)
    if norm is not None:
        handle = norm.register_forward_hook(lambda module, given, out: seen.append(out))
    elif hasattr(first, "k_proj"):
        handle = first.k_proj.register_forward_hook(lambda module, given, out: seen.append(out))
    else:  # queries, keys and values in one matrix
        heads, kv = config.num_attention_heads, config.num_key_value_heads
        width = config.hidden_size // heads
        cut = slice(heads * width, (heads + kv) * width)
        handle = first.qkv_proj.register_forward_hook(lambda module, given, out: seen.append(out[..., cut]))
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    handle.remove()
    keys = cache.layers[0].keys
    before = seen[0].reshape(2, 20, keys.shape[1], keys.shape[3]).transpose(1, 2)
    rotary = Rotary(config)
    torch.testing.assert_close(rotary.turn(keys, torch.arange(20), back=True), before, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(rotary.turn(before, torch.arange(20)), keys, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(keys, before, atol=1e-3)


@pytest.mark.parametrize("kind", SCALED)
def test_every_fixed_kind_of_angle_is_the_models_own(kind):
    model = tiny("llama", rope_parameters=SCALED[kind])
    x, at = torch.randn(2, 3, 9, model.config.head_dim), torch.tensor([[0, 1, 2, 5, 9, 33, 70, 71, 200], [3, 3, 4, 4, 5, 5, 6, 6, 7]])
    cos, sin = model.base_model.rotary_emb(x, at)
    left, right = x.chunk(2, -1)
    wanted = x * cos.unsqueeze(1) + torch.cat((-right, left), -1) * sin.unsqueeze(1)
    rotary = Rotary(model.config)
    torch.testing.assert_close(rotary.turn(x, at), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotary.turn(rotary.turn(x, at), at, back=True), x, atol=1e-5, rtol=1e-5)
    assert rotary.turn(x.to(torch.bfloat16), at).dtype == torch.bfloat16


def test_what_cannot_be_turned_back_is_refused_by_name():
    with pytest.raises(SmeltError, match="keys of bert models cannot be taken back"):
        Rotary(tiny("bert").config)
    config = tiny("llama").config
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(SmeltError, match="'dynamic' change with the length"):
        Rotary(config)
