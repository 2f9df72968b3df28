"""What is read of an attention module, against the module itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from smelt.attention._heads import Shape, adopt, attended, heads, refuse, shape, weights
from smelt.model._swap import SwappedLinear
from smelt.model._tiny import tiny
from smelt.model._walk import attention_of, blocks
from smelt.spec import SmeltError


def caught(model, tokens):
    """(attention module of layer 0, its input, its angles, what it gave)."""
    was, seen = attention_of(blocks(model)[0]), {}
    hook = was.register_forward_hook(lambda m, a, k, out: seen.update(k, out=out[0]), with_kwargs=True)
    with torch.no_grad():
        model(tokens)
    hook.remove()
    return was, seen["hidden_states"], seen["position_embeddings"], seen["out"]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3", "gemma", "phi3"])
def test_attention_over_them_is_the_modules_own(architecture):
    model = tiny(architecture)
    for name, p in model.named_parameters():
        if name.endswith("bias"):  # they begin at zero
            nn.init.normal_(p)
    was, hidden, angles, out = caught(model, torch.randint(2, 300, (2, 20)))
    refuse(was, "x")
    assert shape(was) == Shape(4, 2, 16, 64)
    query, key, value = heads(was, hidden, angles)
    made = attended(query, key, value, was.scaling)
    torch.testing.assert_close(was.o_proj(made.transpose(1, 2).flatten(2)), out, atol=1e-5, rtol=1e-4)
    matrix = weights(query, key, was.scaling)
    torch.testing.assert_close(matrix @ value.repeat_interleave(2, 1), made, atol=1e-5, rtol=1e-4)
    assert matrix.dtype == torch.float32 and torch.equal(matrix.triu(1), torch.zeros_like(matrix))


def test_a_part_of_the_channels_may_be_rotated():
    was, hidden, (cos, sin), _ = caught(tiny("llama"), torch.randint(2, 300, (1, 9)))
    whole, part = heads(was, hidden, (cos, sin))[0], heads(was, hidden, (cos[..., :8], sin[..., :8]))[0]
    still = was.q_proj(hidden).unflatten(-1, (-1, 16)).transpose(1, 2)
    assert torch.equal(part[..., 8:], still[..., 8:]) and not torch.allclose(part[..., :8], whole[..., :8])


def test_what_is_adopted_is_the_same():
    for architecture in ("qwen3", "phi3"):
        was, hidden, angles, _ = caught(tiny(architecture), torch.randint(2, 300, (1, 9)))
        mixer = nn.Module()
        adopt(mixer, was)
        assert all(p is q for p, q in zip(mixer.parameters(), was.parameters(), strict=True))
        for one, two in zip(heads(mixer, hidden, angles), heads(was, hidden, angles), strict=True):
            assert torch.equal(one, two)


class Other(SwappedLinear):
    owner = "weights.other"

    def settings(self):
        return {}

    @classmethod
    def build(cls, was):
        return cls(1, 1)

    def product(self, x):
        return x

    def dense(self):
        return torch.ones(1, 1)


def test_other_attention_is_refused_by_what_it_has():
    was = attention_of(blocks(tiny("bert"))[0])
    was.config = SimpleNamespace()
    with pytest.raises(SmeltError, match="x takes the place of attention with q_proj"):
        refuse(was, "x")
    with pytest.raises(SmeltError, match="sliding window"):
        refuse(attention_of(blocks(tiny("mistral", sliding_window=8))[0]), "x")
    for architecture, name in (("llama", "clip_qkv"), ("gemma", "attn_logit_softcapping")):
        was = attention_of(blocks(tiny(architecture))[0])
        setattr(was.config, name, 5.0)
        with pytest.raises(SmeltError, match=f"{name}=5.0"):
            refuse(was, "x")
    was = attention_of(blocks(tiny("llama"))[0])
    was.k_proj = Other(64, 32)
    with pytest.raises(SmeltError, match="k_proj, which is already another module"):
        refuse(was, "x")
    was = attention_of(blocks(tiny("qwen3"))[0])
    was.q_norm.weight = nn.Parameter(torch.ones(64))
    with pytest.raises(SmeltError, match="q_norm is wider"):
        refuse(was, "x")
