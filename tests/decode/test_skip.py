import copy

import pytest
import torch
from transformers import DynamicCache

from smelt.decode import _skip
from smelt.decode._skip import Policy, Used, inputs, keys_values, skipping
from smelt.model._tiny import tiny
from smelt.model._walk import blocks
from smelt.spec import SmeltError

IDS = torch.randint(2, 320, (2, 12), generator=torch.Generator().manual_seed(0))


class Planned(Policy):
    """Runs what a table [layers, positions] says."""

    def __init__(self, table):
        self.table, self.called = table, []

    def runs(self, layer, state, places):
        return self.table[layer][places].expand(state.shape[:2])

    def left(self, layer, state, out, places):
        self.called.append(layer)
        return out


def turned(x, place):
    """The rotary embedding of [heads, size] at one position, by pairs."""
    half = x.shape[-1] // 2
    out = x.clone()
    for i in range(half):
        angle = torch.tensor(place * 10000.0 ** (-i / half), dtype=torch.float64)
        out[:, i] = x[:, i] * angle.cos() - x[:, i + half] * angle.sin()
        out[:, i + half] = x[:, i + half] * angle.cos() + x[:, i] * angle.sin()
    return out


def slow(model, ids, table):
    """Logits [t, V] by loops over tokens, layers and heads, float64."""
    config, keys, values, said = model.config, {}, {}, []
    size, share = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    for t, token in enumerate(ids.tolist()):
        h = model.model.embed_tokens.weight[token]
        for at, block in enumerate(blocks(model)):
            own, normed = block.self_attn, block.input_layernorm(h)
            keys[at, t] = turned((own.k_proj.weight @ normed).view(-1, size), t)
            values[at, t] = (own.v_proj.weight @ normed).view(-1, size)
            if not table[at][t]:
                continue
            query, heads = turned((own.q_proj.weight @ normed).view(-1, size), t), []
            for i in range(config.num_attention_heads):
                scores = torch.stack([query[i] @ keys[at, s][i // share] for s in range(t + 1)]) / size**0.5
                heads.append(sum(w * values[at, s][i // share] for s, w in enumerate(scores.softmax(0))))
            h = h + own.o_proj.weight @ torch.cat(heads)
            h = h + block.mlp(block.post_attention_layernorm(h))
        said.append(model.lm_head(model.model.norm(h)))
    return torch.stack(said)


@pytest.fixture(scope="module")
def model():
    return tiny("llama", layers=3).double()


@torch.no_grad()
@pytest.mark.parametrize("kept", [0.2, 0.7])
def test_skipping_is_the_slow_loop(model, kept):
    """In one call, in pieces, and token by token, through a cache or not."""
    table = torch.rand(3, 12, generator=torch.Generator().manual_seed(3)) < kept
    wanted = torch.stack([slow(model, row, table) for row in IDS])
    with skipping(model, Planned(table)):
        assert torch.allclose(model(IDS).logits, wanted, atol=1e-5)  # the rotary angles are float32
        for step in (1, 5):
            cache, said = DynamicCache(), []
            for at in range(0, 12, step):
                said.append(model(IDS[:, at : at + step], past_key_values=cache).logits)
            assert torch.allclose(torch.cat(said, 1), wanted, atol=1e-5)
            assert {layer.get_seq_length() for layer in cache.layers} == {12}
    assert not torch.allclose(model(IDS).logits, wanted, atol=1e-3)


@torch.no_grad()
def test_a_layer_nobody_runs_is_a_layer_less(model):
    table = torch.ones(3, 64, dtype=torch.bool)
    table[1] = False
    shorter = copy.deepcopy(model)
    del shorter.model.layers[1]
    shorter.model.layers[1].self_attn.layer_idx, shorter.config.num_hidden_layers = 1, 2
    ran = []
    handle = model.model.layers[1].mlp.register_forward_hook(lambda *_: ran.append(1))
    with skipping(model, Planned(table)):
        ran.clear()  # of the trial before
        assert torch.equal(model(IDS).logits, shorter(IDS).logits)
        assert (
            model.generate(IDS, max_new_tokens=9, do_sample=False).tolist()
            == shorter.generate(IDS, max_new_tokens=9, do_sample=False).tolist()
        )
    handle.remove()
    assert not ran


@torch.no_grad()
def test_nothing_skipped_is_plain_and_all_comes_off(model):
    before = model(IDS).logits
    policy = Planned(torch.ones(3, 12, dtype=torch.bool))
    with skipping(model, policy):
        assert torch.equal(model(IDS).logits, before)
        other = copy.deepcopy(model)
        other.model.layers[2].mlp.down_proj.weight.zero_()  # the copy works on its own layers
        assert torch.equal(model(IDS).logits, before) and not torch.equal(other(IDS).logits, before)
    assert policy.called == [0, 1, 2] * 3
    assert not any("forward" in vars(block) for block in blocks(model))
    block = model.model.layers[0]
    mine = block.forward
    vars(block)["forward"] = lambda *args, **kwargs: mine(*args, **kwargs) * 2
    held = vars(block)["forward"]
    with skipping(model, policy):
        assert not torch.equal(model(IDS).logits, before)  # what was set there before still runs
    assert vars(block).pop("forward") is held


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2"])
def test_keys_and_values_are_the_models_own(kind):
    model = tiny(kind)
    for weight in model.parameters():  # norms and biases that do something
        weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    cache = DynamicCache(config=model.config)
    with inputs(model) as seen:
        model(IDS, past_key_values=cache)
    for block, layer, (state, kwargs, out) in zip(blocks(model), cache.layers, seen, strict=True):
        keys, values = keys_values(block, state, kwargs["position_embeddings"])
        assert torch.equal(keys, layer.keys) and torch.equal(values, layer.values) and out.shape == state.shape
    with skipping(model, Planned(torch.ones(2, 12, dtype=torch.bool))):
        pass


def test_models_it_cannot_write_for_are_refused(model, monkeypatch):
    for kind, match in (("phi3", "not three separate maps"), ("bert", "bert")):
        with pytest.raises((SmeltError, ValueError, TypeError), match=match), skipping(tiny(kind), Planned(None)):
            pass
    monkeypatch.setattr(_skip, "keys_values", lambda *given: tuple(2 * x for x in keys_values(*given)))
    with pytest.raises(SmeltError, match="llama models cannot be written without running their layers"), skipping(model, Planned(None)):
        pass
    assert not any("forward" in vars(block) for block in blocks(model))


def test_shares_by_phase_without_the_first_position():
    used = Used(2)
    used.count(0, torch.tensor([[True, True, False]]), torch.tensor([[0, 1, 2]]))
    used.count(1, torch.tensor([[True, False, False], [True, True, True]]), torch.tensor([[0, 1, 2]]))
    used.count(1, torch.tensor([[False]]), torch.tensor([[3]]))
    assert used.shares("prompt").tolist() == [1 / 2, 2 / 4]
    assert used.shares().tolist() == [1 / 2, 2 / 5]
    assert used.shares("response")[1] == 0 and used.shares("response")[0].isnan()
    used.count(0, torch.tensor([[True]]), None)
    assert used.shares("response").tolist() == [1, 0]
