"""Every architecture through the same few questions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import GPT2Config

from smelt.model._tiny import ARCHITECTURES, tiny
from smelt.model._walk import attention_of, blocks, linears, mlp_of, parts, stack
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
