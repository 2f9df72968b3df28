from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from smelt.model._load import load, save
from smelt.model._swap import swapped
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights._adapter import learned
from smelt.weights.invertible_adapter import Coupling, InvertibleAdapter
from smelt.weights.lora import Lora
from smelt.weights.sequential_adapter import SequentialAdapter

IDS = torch.arange(48).view(2, 24) * 5 % 320


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def stir(model):
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn(p.shape, generator=draw), alpha=0.1)


@torch.no_grad()
def test_the_inverse_undoes_it_and_it_is_the_rule():
    torch.manual_seed(0)
    made = Coupling(nn.Embedding(50, 16), 16, False)
    for p in made.parameters():
        p.data.normal_(std=0.5)
    e = torch.randn(3, 7, 16)
    assert_close(made.undo(made.do(e)), e, rtol=0, atol=1e-6 * float(made.do(e).abs().max()))
    assert_close(made.do(made.undo(e)), e, rtol=0, atol=1e-6 * float(made.undo(e).abs().max()))
    f, g = (lambda x, m=m: m[2].weight @ (m[0].weight @ x).clamp(min=0) for m in (made.first, made.second))
    for i in range(3):
        a, b = e[i, 0, :8], e[i, 0, 8:]
        top = a + f(b)
        assert_close(made.do(e)[i, 0], torch.cat([top, b + g(top)]), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[3, 4]])
    assert torch.equal(made(ids), made.do(made.weight[ids]))


@pytest.mark.parametrize("inside", [None, SequentialAdapter(reduction=4), Lora(rank=2)])
def test_the_count_is_the_formula(inside):
    d = 64
    method, model = InvertibleAdapter(blocks=inside), tiny("llama", hidden=d)
    assert method.parameters(model) == d * d // 2 + (0 if inside is None else inside.parameters(model))


def test_the_head_reads_the_inverse_of_the_last_norm():
    model = tiny("llama")
    model.requires_grad_(False)
    attached = InvertibleAdapter(blocks=None).attach(model, 0)
    stir(model)
    seen = {}
    model.model.norm.inner.register_forward_hook(lambda m, i, o: seen.update(norm=o))
    made = logits(model)
    with torch.no_grad():
        e = model.model.embed_tokens.undo(seen["norm"])
        assert_close(made, e @ model.lm_head.weight.T)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all(n.startswith("model.embed_tokens.") for n in names), "both sides share F and G while they learn"
    attached.finish()
    assert torch.equal(logits(model), made)
    sides = {n: p for n, p in model.named_parameters() if "first" in n or "second" in n}
    assert len(sides) == 8


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("inside", [None, SequentialAdapter(reduction=4), Lora(rank=2)])
def test_its_checkpoint_loads_again(tmp_path, inside, tied):
    model = tiny("llama", tie_word_embeddings=tied)

    def train():
        stir(model)
        return {}

    about = learned(InvertibleAdapter(blocks=inside), model, train, lambda: IDS, 0, tmp_path)
    assert about["adapter"]["merged"] is False and (tmp_path / "adapter").is_dir() == isinstance(inside, Lora)
    save(model, tiny_tokenizer(), tmp_path / "m")
    again = load(tmp_path / "m").model
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(again), logits(tiny("llama", tie_word_embeddings=tied)))
    assert len(list(swapped(again))) == 2 + 2 * isinstance(inside, SequentialAdapter)


def test_what_does_not_fit_is_refused():
    with pytest.raises(SmeltError, match="66 channels are not a multiple of 4"):
        InvertibleAdapter().parameters(tiny("llama", hidden=66, heads=2, kv_heads=1, head_dim=32))
    with pytest.raises(SmeltError, match="has no plain embedding or no last norm"):
        InvertibleAdapter().parameters(tiny("bert"))
    for inside in (3, InvertibleAdapter()):
        with pytest.raises(SmeltError, match="an adapter inside the blocks is expected"):
            InvertibleAdapter(blocks=inside)
    model = tiny("llama")
    InvertibleAdapter(blocks=None).attach(model, 0)
    with pytest.raises(SmeltError, match="has such an adapter already"):
        InvertibleAdapter(blocks=None).parameters(model)
    for was, settings in ((nn.Embedding(5, 8), {"size": 8}), (nn.Embedding(5, 8), {"size": 6, "inverse": False})):
        with pytest.raises(SmeltError, match="its settings are"):
            Coupling.build(was, **settings)
    for was, inverse in ((nn.Embedding(5, 8), True), (nn.LayerNorm(8), False), (nn.Embedding(5, 12), False), (nn.ReLU(), True)):
        with pytest.raises(SmeltError, match="is not what it stands for"):
            Coupling.build(was, size=8, inverse=inverse)
