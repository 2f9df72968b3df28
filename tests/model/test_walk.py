"""Every architecture through the same few questions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from smelt.model._tiny import ARCHITECTURES, tiny
from smelt.model._walk import attention_of, blocks, fold, folds, linears, mlp_of, parts, stack
from smelt.spec import SmeltError

DECODERS = [name for name in ARCHITECTURES if name != "bert"]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parts_are_the_sizes_asked_for(name):
    found = parts(tiny(name, layers=3).config)
    kv = 4 if name == "bert" else 2
    assert found == (3, 64, 96, 4, kv, 16, 320, 256)


def test_a_configuration_without_them_is_refused():
    with pytest.raises(SmeltError, match="gpt2: its configuration has no 'intermediate_size'"):
        parts(GPT2Config())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_blocks_are_the_modules_the_model_runs_in_order(name):
    model = tiny(name, layers=3)
    ran = []
    handles = [b.register_forward_hook(lambda m, a, o, i=i: ran.append(i)) for i, b in enumerate(blocks(model))]
    with torch.no_grad():
        model(input_ids=torch.tensor([[2, 3, 4]]))
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2] and len(blocks(model)) == 3


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_linears_are_all_linear_maps_inside_the_blocks(name):
    model = tiny(name, layers=11)
    inside = {id(m) for b in blocks(model) for m in b.modules() if isinstance(m, nn.Linear)}
    found = list(linears(model))
    assert {id(m) for _, _, m in found} == inside and len(found) == len(inside)
    assert [i for i, _, _ in found] == sorted(i for i, _, _ in found) and {i for i, _, _ in found} == set(range(11))
    for index, full, module in found:
        assert model.get_submodule(full) is module and f".{index}." in full
    outside = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    assert not outside & inside


@pytest.mark.parametrize("name", DECODERS)
def test_a_block_is_its_attention_its_mlp_and_norms(name):
    for block in blocks(tiny(name)):
        attention, mlp = attention_of(block), mlp_of(block)
        assert attention.layer_idx in (0, 1) and attention is not mlp
        counted = sum(p.numel() for part in (attention, mlp) for p in part.parameters())
        rest = [p for p in block.parameters() if p.dim() == 1]
        assert counted + sum(p.numel() for p in rest) >= sum(p.numel() for p in block.parameters()) > counted


def test_an_encoder_has_attention_and_no_single_mlp():
    block = blocks(tiny("bert"))[0]
    assert isinstance(attention_of(block), nn.Module)
    with pytest.raises(SmeltError, match="BertLayer: no mlp module"):
        mlp_of(block)


def test_what_has_no_blocks_is_refused():
    with pytest.raises(SmeltError, match="no list of layers found"):
        stack(nn.Linear(2, 2))
    with pytest.raises(SmeltError, match="Linear: no attention module"):
        attention_of(nn.Linear(2, 2))


def test_no_blocks_at_all_is_an_empty_list():
    model = tiny("llama")
    stack(model).layers = nn.ModuleList()
    assert len(blocks(model)) == 0 and list(linears(model)) == []


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("name", DECODERS)
def test_folding_a_scale_leaves_the_function(name, kv_heads):
    """One place at a time and all of them, behind random gains and biases. The next test shows that each place counts."""
    ids, draw = torch.arange(2, 50).view(2, 24), torch.Generator().manual_seed(0)
    model = tiny(name, kv_heads=kv_heads)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.rand(p.shape, generator=draw))
        before = model(ids).logits
        for block in blocks(model):
            found = folds(block)
            assert len(found) == (4 if kv_heads == 4 else 3)
            for place in found:
                old = [reader.weight.clone() for reader in place.readers]
                scale = torch.rand(place.readers[0].in_features, generator=draw) * 3 + 0.2
                fold(place, scale)
                for weight, reader in zip(old, place.readers, strict=True):
                    torch.testing.assert_close(reader.weight, weight * scale)
                torch.testing.assert_close(model(ids).logits, before, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("name", DECODERS)
def test_a_scale_of_one_changes_no_bit_and_every_place_counts(name):
    ids = torch.arange(2, 50).view(2, 24)
    for at in range(4):
        model = tiny(name, kv_heads=4)
        place = folds(blocks(model)[0])[at]
        size = place.readers[0].in_features
        before = {n: p.clone() for n, p in model.named_parameters()}
        fold(place, torch.ones(size))
        assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
        with torch.no_grad():
            logits = model(ids).logits
            fold(place._replace(readers=()), torch.linspace(0.5, 3.0, size))  # the source alone
            assert (model(ids).logits - logits).abs().max() > 0.05


def test_blocks_put_together_otherwise_are_refused():
    block = blocks(tiny("llama"))[0]
    block.input_layernorm = nn.LayerNorm(64)
    with pytest.raises(SmeltError, match="LayerNorm: not a root-mean-square norm"):
        fold(folds(block)[0], torch.full((64,), 2.0))
    for lost in ("self_attn.o_proj", "mlp.gate_proj", "post_attention_layernorm"):
        block = blocks(tiny("llama"))[0]
        owner, _, name = lost.rpartition(".")
        setattr(block.get_submodule(owner), name, None)
        with pytest.raises(SmeltError, match="LlamaDecoderLayer: no norm before"):
            folds(block)
