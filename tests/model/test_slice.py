from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.model._slice import KNOWN, everything, head_input, norms, resized, sliced
from smelt.model._tiny import tiny
from smelt.spec import SmeltError

IDS = torch.arange(2, 42).view(2, 20)


def shuffled(count, keep, seed=0):
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:keep].sort().values


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def cut(model, layers=(0, 2), hidden=40, ffn=56, queries=((0, 3), (1, 2), (1, 3)), groups=(0, 1)):
    keep = everything(model)
    keep.layers = list(layers)
    keep.channels = shuffled(64, hidden)
    keep.neurons = [shuffled(96, ffn, seed) for seed in range(3)]
    keep.queries = [torch.tensor(q) for q in queries]
    keep.groups = [torch.tensor(groups) for _ in range(3)]
    return keep


@pytest.mark.parametrize("architecture", KNOWN)
def test_keeping_everything_is_the_identity(architecture):
    model = tiny(architecture)
    made = sliced(model, everything(model))
    assert made is not model and torch.equal(logits(made), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_equals_a_loop_over_single_weights(architecture):
    model = tiny(architecture, layers=3)
    keep = cut(model)
    made, dim = sliced(model, keep), 16
    channels, widen = keep.channels.tolist(), (64 / 40) ** 0.5
    for new, old in enumerate(keep.layers):
        a, b = made.model.layers[new], model.model.layers[old]
        for i, j in enumerate(keep.neurons[old].tolist()):
            for c, d in enumerate(channels):
                assert a.mlp.up_proj.weight[i, c] == b.mlp.up_proj.weight[j, d]
                assert a.mlp.gate_proj.weight[i, c] == b.mlp.gate_proj.weight[j, d]
                assert a.mlp.down_proj.weight[c, i] == b.mlp.down_proj.weight[d, j]
        for h, g in enumerate(keep.queries[old].tolist()):
            for x in range(dim):
                q, p = h * dim + x, g * dim + x
                for c, d in enumerate(channels):
                    assert a.self_attn.q_proj.weight[q, c] == b.self_attn.q_proj.weight[p, d]
                    assert a.self_attn.o_proj.weight[c, q] == b.self_attn.o_proj.weight[d, p]
                if a.self_attn.q_proj.bias is not None:
                    assert a.self_attn.q_proj.bias[q] == b.self_attn.q_proj.bias[p]
        assert torch.equal(a.self_attn.v_proj.weight, b.self_attn.v_proj.weight[:, channels])
        assert_close(a.input_layernorm.weight, b.input_layernorm.weight[channels] * widen)
        assert a.self_attn.layer_idx == new
    assert torch.equal(made.model.embed_tokens.weight, model.model.embed_tokens.weight[:, channels])
    assert made.lm_head.weight is made.model.embed_tokens.weight, "tied matrices are cut once"


def test_fused_matrices_are_cut_part_by_part():
    """phi3 stacks query, key and value, and gate and up: it must equal the llama of the same numbers."""
    phi, llama = tiny("phi3", layers=3), tiny("llama", layers=3)
    state = {n: p for n, p in llama.state_dict().items() if "self_attn" not in n and "gate_" not in n and "up_" not in n}
    for i in range(3):
        at, mlp = llama.model.layers[i].self_attn, llama.model.layers[i].mlp
        state[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat([at.q_proj.weight, at.k_proj.weight, at.v_proj.weight])
        state[f"model.layers.{i}.self_attn.o_proj.weight"] = at.o_proj.weight
        state[f"model.layers.{i}.mlp.gate_up_proj.weight"] = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    phi.load_state_dict(state)
    phi.config.rms_norm_eps = llama.config.rms_norm_eps
    for _, norm in [*norms(phi)]:
        norm.variance_epsilon = llama.config.rms_norm_eps
    assert_close(logits(phi), logits(llama), rtol=0, atol=1e-5)
    assert_close(logits(sliced(phi, cut(phi))), logits(sliced(llama, cut(llama))), rtol=0, atol=1e-5)


def dead_channels(model, alive):
    """Make all channels but `alive` carry nothing, from the embedding on."""
    dead = [c for c in range(64) if c not in alive.tolist()]
    with torch.no_grad():
        model.get_input_embeddings().weight[:, dead] = 0
        for block in model.model.layers:
            for writer in head_input(block):
                writer.weight[dead] = 0
                if writer.bias is not None:
                    writer.bias[dead] = 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", KNOWN)
def test_cutting_dead_channels_changes_nothing(architecture, tied):
    """RMSNorm's smaller mean, Gemma's sqrt(hidden) and its 1 + weight are all made up for."""
    model = tiny(architecture, layers=3, tie_word_embeddings=tied, rms_norm_eps=1e-12)
    keep = everything(model)
    keep.channels = shuffled(64, 36)
    dead_channels(model, keep.channels)
    for _, norm in norms(model):
        torch.nn.init.normal_(norm.weight, 0.5, 0.2)
    assert_close(logits(sliced(model, keep)), logits(model), rtol=0, atol=1e-3 if architecture == "gemma2" else 1e-4)


@pytest.mark.parametrize("architecture", KNOWN)
def test_cutting_dead_neurons_heads_and_layers_changes_nothing(architecture):
    model = tiny(architecture, layers=3)
    keep = cut(model, hidden=64)
    keep.channels = torch.arange(64)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            heads, neurons = head_input(block)
            out = [h * 16 + x for h in range(4) if h not in keep.queries[layer].tolist() for x in range(16)]
            heads.weight[:, out] = 0
            neurons.weight[:, [n for n in range(96) if n not in keep.neurons[layer].tolist()]] = 0
            if layer not in keep.layers:
                for writer in (heads, neurons):
                    writer.weight.zero_()
                    if writer.bias is not None:
                        writer.bias.zero_()
    assert_close(logits(sliced(model, keep)), logits(model), rtol=0, atol=1e-5)


def test_whole_groups_can_go():
    """Query heads go with the key and value they read."""
    model = tiny("llama", layers=3)
    keep = cut(model, layers=(0, 1, 2), hidden=64, ffn=96, queries=((2, 3),) * 3, groups=(1,))
    keep.channels, keep.neurons = torch.arange(64), [torch.arange(96)] * 3
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight[:, :32] = 0
    assert_close(logits(sliced(model, keep)), logits(model), rtol=0, atol=1e-5)


def test_layer_types_follow_their_layers():
    model = tiny("gemma2", layers=4, sliding_window=4)
    types = model.config.layer_types
    keep = everything(model)
    keep.layers = [1, 2, 3]
    made = sliced(model, keep)
    assert made.config.layer_types == types[1:] and len(set(types)) == 2
    for block, old in zip(made.model.layers, list(model.model.layers)[1:], strict=True):
        assert block.self_attn.sliding_window == old.self_attn.sliding_window


def test_the_random_state_is_left_alone():
    model = tiny("llama")
    before = torch.get_rng_state()
    sliced(model, everything(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_unknown_architectures_and_parameters_are_refused():
    with pytest.raises(SmeltError, match="'bert' models cannot be cut"):
        everything(tiny("bert"))
    model = tiny("llama")
    model.model.layers[0].mlp.extra = torch.nn.Linear(64, 3)
    with pytest.raises(SmeltError, match=r"extra\.weight. is a parameter whose axes"):
        sliced(model, everything(model))
    config = tiny("llama").config
    config.quantization_config = {"quant_method": "compressed-tensors"}
    with pytest.raises(SmeltError, match="quantized"):
        resized(config, [0], 64, 4, 2, 96)
