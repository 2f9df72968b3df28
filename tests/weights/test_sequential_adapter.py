from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smelt.model._load import load, save
from smelt.model._swap import swapped
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import blocks
from smelt.spec import SmeltError
from smelt.weights.sequential_adapter import ACTIVATIONS, Bottleneck, SequentialAdapter

IDS = torch.arange(48).view(2, 24) * 5 % 320


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def stirred(model):
    draw = torch.Generator().manual_seed(0)
    for _, module in swapped(model):
        for name, p in module.named_parameters():
            if not name.startswith("inner"):
                p.data.copy_(torch.randn(p.shape, generator=draw) * 0.3 + (name == "norm.weight"))
    return model


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_it_is_the_rule_row_by_row(activation):
    torch.manual_seed(0)
    made = Bottleneck(nn.Linear(5, 8), 3, activation)
    for p in made.parameters():
        p.data.normal_()
    x = torch.randn(2, 3, 5)
    f = ACTIVATIONS[activation]()
    for i in range(2):
        for j in range(3):
            h = made.inner.weight @ x[i, j] + made.inner.bias
            normal = (h - h.mean()) / (h.var(unbiased=False) + 1e-5).sqrt() * made.norm.weight + made.norm.bias
            wanted = h + made.up.weight @ f(made.down.weight @ normal)
            assert_close(made(x)[i, j], wanted, rtol=1e-5, atol=1e-5)
    assert made.down.weight.shape == (8 // 3, 8)


@pytest.mark.parametrize("where, places", [("ffn", 1), ("both", 2)])
@pytest.mark.parametrize("reduction", [1, 5, 16])
def test_the_count_is_the_formula(where, places, reduction):
    method, d, layers = SequentialAdapter(reduction=reduction, where=where), 64, 3
    model = tiny("llama", hidden=d, layers=layers)
    wanted = layers * places * (2 * d * (d // reduction) + 2 * d)
    assert method.parameters(model) == wanted
    before = model.num_parameters()
    method.attach(model, 0)
    assert model.num_parameters() - before == wanted
    assert [n.split(".")[-1] for n, _ in swapped(model)] == (["o_proj", "down_proj"] if places == 2 else ["down_proj"]) * layers


def test_it_reads_the_output_of_the_part_before_it_joins_the_stream():
    model = tiny("llama")
    SequentialAdapter(reduction=4, where="both").attach(model, 0)
    stirred(model)
    block = blocks(model)[0]
    seen = {}
    hooks = [block.mlp.register_forward_hook(lambda m, i, o: seen.update(mlp=o, into=i[0]))]
    logits(model)
    for hook in hooks:
        hook.remove()
    part, mlp = block.mlp.down_proj, block.mlp
    with torch.no_grad():
        plain = part.inner(mlp.act_fn(mlp.gate_proj(seen["into"])) * mlp.up_proj(seen["into"]))
        assert_close(seen["mlp"], plain + part.up(part.f(part.down(part.norm(plain)))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_checkpoint_loads_again(tmp_path, dtype):
    model = tiny("mistral").to(dtype)
    SequentialAdapter(reduction=8, where="both", activation="gelu").attach(model, 0)
    stirred(model)
    save(model, tiny_tokenizer(), tmp_path / "m")
    again = load(tmp_path / "m", dtype=dtype).model
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(tiny("mistral").to(dtype)))


def test_what_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="reduction=65 leaves nothing of 64 channels"):
        SequentialAdapter(reduction=65).attach(tiny("llama"), 0)
    model = tiny("llama")
    SequentialAdapter().attach(model, 0)
    with pytest.raises(SmeltError, match="has such adapters already"):
        SequentialAdapter().parameters(model)
    for settings in ({}, {"reduction": 4}, {"reduction": 0, "activation": "relu"}, {"reduction": 4, "activation": "tanh"}):
        with pytest.raises(SmeltError, match="its settings are a reduction and an activation"):
            Bottleneck.build(nn.Linear(4, 4), **settings)
    with pytest.raises(SmeltError, match="not for a LayerNorm"):
        Bottleneck.build(nn.LayerNorm(4), reduction=2, activation="relu")
