from __future__ import annotations

import math

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from smelt.attention._linear import linear
from smelt.attention._mixer import convert, place
from smelt.attention.lightning import Lightning, slopes
from smelt.model._rotary import Rotary
from smelt.model._tiny import tiny
from smelt.model._walk import attention_of, blocks
from smelt.registry import parse
from smelt.spec import SmeltError

NO_ENDS = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": None}


def modules(method, layers=3):
    model = tiny("llama", layers=layers, **NO_ENDS)
    before = [attention_of(block) for block in blocks(model)]
    place(model, convert(model, method))
    return model, before, [attention_of(block) for block in blocks(model)]


def slow(module, hidden, config):
    """The decayed sum written out, float64, one query at a time; rotary angles by the formula of model/_rotary.py."""
    size, h, g = config.head_dim, config.num_attention_heads, config.num_key_value_heads
    x = hidden.double()
    tokens = x.shape[1]
    made = {}
    for name, heads in (("q_proj", h), ("k_proj", g), ("v_proj", g)):
        made[name] = (x @ getattr(module, name).weight.double().T).unflatten(-1, (heads, size)).transpose(1, 2)
    query, key = (made[n] / (1 + torch.exp(-made[n])) for n in ("q_proj", "k_proj"))
    if module.layer_idx == 0:
        turn = Rotary(config).turn
        query, key = turn(query, torch.arange(tokens)), turn(key, torch.arange(tokens))
    out = torch.zeros(len(x), tokens, h, size).double()
    for head in range(h):
        share = 1 - module.layer_idx / (config.num_hidden_layers - 1) + 1e-5
        s = 2 ** (-8 * (head + 1) / h) * share
        for i in range(tokens):
            for j in range(i + 1):
                weight = math.exp(-s * (i - j)) * (query[:, head, i] * key[:, head * g // h, j]).sum(-1)
                out[:, i, head] += weight[:, None] * made["v_proj"][:, head * g // h, j]
    out = out.flatten(2)
    out = out * out.shape[-1] ** 0.5 / out.norm(dim=-1, keepdim=True)
    if module.gate is not None:
        out = out * (x @ module.gate.weight.double().T)
    return out @ module.o_proj.weight.double().T


@pytest.mark.parametrize("gate", [True, False])
def test_every_layer_is_the_decayed_sum_normed_and_gated(gate):
    model, _, made = modules(Lightning(gate=gate))
    hidden = torch.randn(2, 30, 64)
    angles = model.model.rotary_emb(hidden, torch.arange(30)[None])
    for module in made:
        with torch.no_grad():
            out = module.mix(hidden, angles, None, None)
        torch.testing.assert_close(out.double(), slow(module, hidden, model.config), atol=5e-5, rtol=1e-3)


def test_the_maps_are_the_models_own_and_only_the_gate_is_new():
    _, before, made = modules(Lightning())
    for was, module in zip(before, made):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert getattr(module, name).weight is getattr(was, name).weight
        assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"q_proj", "k_proj", "v_proj", "o_proj", "gate"}
    _, _, bare = modules(Lightning(gate=False))
    assert all(module.gate is None for module in bare)


def test_slopes_halve_as_alibis_and_fade_with_depth():
    assert slopes(8, 0, 3) == pytest.approx([2.0 ** -(i + 1) * (1 + 1e-5) for i in range(8)])
    assert slopes(8, 1, 3) == pytest.approx([2.0 ** -(i + 1) * (0.5 + 1e-5) for i in range(8)])
    assert slopes(8, 2, 3) == pytest.approx([2.0 ** -(i + 1) * 1e-5 for i in range(8)])
    assert slopes(4, 0, 1) == pytest.approx([2.0 ** (-2 * (i + 1)) * (1 + 1e-5) for i in range(4)])


@pytest.mark.parametrize("chunk", [5, 16, 128])
def test_the_recurrence_is_that_of_minimax_in_transformers(chunk):
    """Its sums of blocks, before its own norm and gate."""
    config = MiniMaxConfig(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16, num_hidden_layers=3, block_size=8, vocab_size=50
    )
    theirs = MiniMaxLightningAttention(config, 1)
    hidden, seen = torch.randn(2, 37, 64), {}
    mask = torch.ones(2, 37)
    mask[1, :9] = 0
    theirs.norm.register_forward_pre_hook(lambda module, args: seen.update(out=args[0]))
    with torch.no_grad():
        theirs(hidden, (hidden, hidden), mask)
        three = torch.nn.functional.silu(theirs.qkv_proj(hidden)).view(2, 37, 4, 48).transpose(1, 2).split(16, -1)
        out, _ = linear(*three, real=mask.bool(), decay=theirs.slope_rate.flatten(), chunk=chunk)
    ours = out.transpose(1, 2).flatten(2)
    torch.testing.assert_close(ours[0], seen["out"][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(ours[1, 9:], seen["out"][1, 9:], atol=1e-5, rtol=1e-4)


def test_what_cannot_be_is_refused():
    with pytest.raises(SmeltError, match="no such 'q_proj'"):
        convert(tiny("phi3"), Lightning())
    with pytest.raises(SmeltError, match="3 slopes for 4 heads"):
        Lightning.module.build(attention_of(blocks(tiny("llama"))[0]), slopes=[0.1, 0.2, 0.3], gate=True, rotary=True)
    assert parse("lightning(gate=False, layers=(0, 2))", "attention") == Lightning(gate=False, layers=(0, 2))
