from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import smelt.weights.minitron as minitron
from smelt import registry
from smelt.model._load import save
from smelt.model._slice import KNOWN
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import parts
from smelt.spec import SmeltError
from smelt.weights._importance import Energy, influence, mean_loss, removal_loss
from smelt.weights.minitron import Minitron, best, counter, grouped

# In a process that never imports smelt: {folder: (logits, greedy tokens)}.
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
found, ids = {}, torch.arange(2, 42).view(2, 20)
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(ids).logits, model.generate(ids, max_new_tokens=6, do_sample=False)
assert not [name for name in sys.modules if name.split(".")[0] == "smelt"]
torch.save(found, sys.argv[1])
"""
IDS = torch.arange(2, 42).view(2, 20)


def test_best_and_grouped_equal_loops():
    score = torch.tensor([3.0, 1.0, 3.0, 2.0, 9.0])
    assert best(score, 3).tolist() == [0, 2, 4] and best(score, 2).tolist() == [0, 4]
    energy = torch.rand(4, 3)
    groups, queries = grouped(energy, 2, 4)
    order = sorted(range(4), key=lambda g: -sum(energy[g].tolist()))[:2]
    assert groups.tolist() == sorted(order)
    want = [3 * g + h for g in sorted(order) for h in sorted(sorted(range(3), key=lambda h: -energy[g, h].item())[:2])]
    assert queries.tolist() == want


@torch.no_grad()
def test_the_order_of_neurons_does_not_matter(rows):
    model = tiny("llama")
    mixed = copy.deepcopy(model)
    for block in mixed.model.layers:
        order = torch.randperm(96)
        for part, dim in ((block.mlp.gate_proj, 0), (block.mlp.up_proj, 0), (block.mlp.down_proj, 1)):
            part.weight.copy_(part.weight.index_select(dim, order))
    assert_close(mixed(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)
    a, b = (Minitron(ffn=40)(m, rows) for m in (model, mixed))
    assert_close(a(IDS).logits, b(IDS).logits, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_planted_dead_parts_rank_last(architecture, rows):
    model = tiny(architecture)
    block = model.model.layers[1]
    block.mlp.down_proj.weight[:, 17] = 0
    block.self_attn.o_proj.weight[:, 16:32] = 0  # head 1
    seen = Energy(model, rows)
    assert seen.neurons(1).argmin() == 17 and seen.heads(1).argmin() == 1
    made = Minitron(ffn=95)(model, rows)
    kept = made.model.layers[1].mlp.down_proj.weight
    assert torch.equal(kept, block.mlp.down_proj.weight[:, [i for i in range(96) if i != 17]])


def pruned_at_random(model, rows, monkeypatch, **sizes):
    draw = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(minitron, "best", lambda score, count: best(torch.rand(len(score), generator=draw), count))
            losses.append(Minitron(**sizes)(model, rows))
    return losses


@torch.no_grad()
@pytest.mark.parametrize("sizes, margin", [({"ffn": 72}, 0.02), ({"ffn": 48}, 0.05), ({"heads": 2}, 0.0), ({"hidden": 48}, 0.02)])
def test_importance_beats_random(sizes, margin, trained, monkeypatch):
    model, rows, held = trained
    chosen = mean_loss(Minitron(**sizes)(model, rows), held)
    drawn = [mean_loss(m, held) for m in pruned_at_random(model, rows, monkeypatch, **sizes)]
    assert mean_loss(model, held) < chosen < sum(drawn) / 3 - margin


@torch.no_grad()
def test_the_gain_of_the_norms_is_worth_it(trained, monkeypatch):
    """Against the same channels with the norms left as they were."""
    model, rows, held = trained
    for hidden in (56, 32):
        made = Minitron(hidden=hidden)(model, rows)
        corrected = mean_loss(made, held)
        for name, p in made.named_parameters():
            if "norm" in name:
                p.mul_((hidden / 64) ** 0.5)
        assert corrected < mean_loss(made, held)


def own_words(model):
    """Rows the model itself would write: without any of its working layers it finds them less likely."""
    ids = torch.arange(2, 82)[:, None]
    ids = model.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


def silenced(layers, silent):
    model = tiny("llama", layers=layers)
    for at in silent:
        model.model.layers[at].self_attn.o_proj.weight.zero_()
        model.model.layers[at].mlp.down_proj.weight.zero_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("depth", ["loss", "influence"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_layers_that_do_nothing_go_first(depth, contiguous):
    model = silenced(5, (1, 2))
    made = Minitron(layers=3, depth=depth, contiguous=contiguous)(model, own_words(model))
    assert_close(made(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert [block.self_attn.layer_idx for block in made.model.layers] == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize("depth", ["loss", "influence"])
def test_contiguous_layers_are_neighbours(depth):
    model = silenced(6, (1, 4))  # alone, these would go

    def gone(**how):
        made = Minitron(layers=4, depth=depth, **how)(model, own_words(model))
        kept = [any(torch.equal(a.mlp.up_proj.weight, b.mlp.up_proj.weight) for b in made.model.layers) for a in model.model.layers]
        return [at for at, stays in enumerate(kept) if not stays]

    assert gone() == [1, 4]
    first, second = gone(contiguous=True)
    assert second == first + 1


def test_plain_transformers_loads_it(rows, tmp_path):
    method, made = Minitron(layers=2, hidden=40, ffn=50, heads=2), {}
    for architecture in KNOWN:
        model = tiny(architecture, layers=3, **({"sliding_window": 8} if architecture == "gemma2" else {}))
        folder = tmp_path / architecture
        made[str(folder)] = method(model, rows)
        save(made[str(folder)], tiny_tokenizer(), folder)
        target = method.target(model.config)
        assert sum(p.numel() for p in type(model)(target).parameters()) == made[str(folder)].num_parameters()
    done = subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path / "out.pt"), *made], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for folder, (logits, tokens) in torch.load(tmp_path / "out.pt").items():
        with torch.no_grad():
            assert torch.equal(logits, made[folder](IDS).logits), folder
            assert torch.equal(tokens, made[folder].generate(IDS, max_new_tokens=6, do_sample=False)), folder


def test_the_model_given_is_left_alone(rows):
    model = tiny("llama", layers=3)
    model.train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    made = Minitron(layers=2, hidden=32)(model, rows)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert model.training and made.training and model.config.hidden_size == 64
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "method, why",
    [
        (Minitron(layers=3), "layers=3 is more than the model's 2"),
        (Minitron(hidden=128), "hidden=128 is more"),
        (Minitron(heads=3), "such as heads=4"),
        (Minitron(heads=8), "such as heads=4"),
        (Minitron(heads=1), "such as heads=2"),
        (Minitron(kv_heads=1, heads=4), "such as heads=2"),
    ],
)
def test_sizes_that_cannot_be_are_refused(method, why, rows):
    for run in (lambda: method.target(tiny("llama").config), lambda: method(tiny("llama"), rows)):
        with pytest.raises(SmeltError, match=why):
            run()


def test_needs_rows_and_a_decoder(rows):
    with pytest.raises(SmeltError, match="calibration rows"):
        Minitron(ffn=8)(tiny("llama"), [])
    with pytest.raises(SmeltError, match="'bert' models cannot be cut"):
        Minitron(ffn=8)(tiny("bert"), rows)


def test_sizes_may_be_shares_of_the_model():
    config = tiny("llama", layers=8, hidden=64, ffn=96).config
    half = Minitron(layers=0.625, ffn=0.5).target(config)
    assert (half.num_hidden_layers, half.intermediate_size, half.hidden_size) == (5, 48, 64)
    assert Minitron(layers=0.01).target(config).num_hidden_layers == 1
    assert Minitron(ffn=0.51).target(config).intermediate_size == 48  # the nearest multiple of 8
    for wrong in ("minitron(layers=1.5)", "minitron(layers=-1)", "minitron(ffn=0.0)"):
        with pytest.raises(SmeltError):
            registry.parse(wrong, "weights")


@torch.no_grad()
def test_influence_and_removal_loss_name_the_same_layers(trained):
    """Their two most important ones, as the notes measured; both of a random model would be in any order."""
    model, rows, _ = trained
    alone = [[at] for at in range(3)]
    harm, change = removal_loss(model, rows, alone), influence(model, rows, alone)
    assert sorted(range(3), key=lambda at: -harm[at])[:2] == sorted(range(3), key=lambda at: -change[at])[:2]


# a budget of parameters


def really(config):
    with torch.device("meta"):
        return type(tiny(config.model_type))(config).num_parameters()


@pytest.mark.parametrize("architecture", KNOWN)
def test_parameters_are_counted_without_a_model(architecture):
    config = tiny(architecture, layers=3).config
    count, old = counter(config), parts(config)
    for sizes in ({}, {"layers": 2}, {"hidden": 40, "ffn": 72}, {"heads": 2}, {"layers": 1, "hidden": 8, "kv_heads": 1, "heads": 1}):
        shape = old._replace(**sizes)
        assert count(shape) == really(Minitron(**sizes).target(config)), sizes


def test_candidates_are_all_shapes_within_five_percent():
    config = tiny("llama", layers=3, hidden=128, ffn=192).config
    whole = really(config)
    found = Minitron(parameters=0.5).candidates(config)
    count, slow = counter(config), set()
    for layers in (1, 2, 3):
        for hidden in {max(8, round(at * 128 / 16 / 8) * 8) for at in range(1, 17)}:
            for ffn in {max(8, round(at * 192 / 16 / 8) * 8) for at in range(1, 17)}:
                for heads in (2, 4):
                    if abs(count(parts(config)._replace(layers=layers, hidden=hidden, ffn=ffn, heads=heads)) / whole - 0.5) <= 0.025:
                        slow.add(Minitron(layers=layers, hidden=hidden, ffn=ffn, heads=heads, kv_heads=2))
    assert set(found) == slow and len(found) == len(slow) > 20
    first = found[0]
    assert (first.layers, first.heads) == (max(m.layers for m in slow), max(m.heads for m in slow if m.layers == first.layers))
    like = [m for m in slow if (m.layers, m.heads) == (first.layers, first.heads)]
    assert all(
        max(a := first.hidden / 128, b := first.ffn / 192) / min(a, b) <= max(c := m.hidden / 128, d := m.ffn / 192) / min(c, d)
        for m in like
    )
    assert found == Minitron(parameters=round(0.5 * whole)).candidates(config)
    assert Minitron(layers=2).candidates(config) == [Minitron(layers=2)]


@torch.no_grad()
def test_a_budget_leaves_what_its_target_says(rows):
    model = tiny("llama", layers=3)
    method = Minitron(parameters=0.6, depth="influence")
    made = method(model, rows)
    assert made.num_parameters() == really(method.target(model.config))
    assert abs(made.num_parameters() / model.num_parameters() - 0.6) <= 0.03 + 1e-9
    first = method.candidates(model.config)[0]
    assert first.depth == "influence" and not first.parameters
    assert torch.equal(made(IDS).logits, first(model, rows)(IDS).logits)


def test_given_sizes_stay_given():
    config = tiny("llama", layers=8, hidden=128, ffn=192).config
    for given in ({"layers": 4}, {"hidden": 128, "ffn": 192}, {"heads": 2, "layers": 0.75}, {"kv_heads": 1}):
        found = Minitron(parameters=0.5, **given).candidates(config)
        want = Minitron(**given).target(config)
        names = {"layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size", "heads": "num_attention_heads"}
        names |= {"kv_heads": "num_key_value_heads"}
        assert found and all(getattr(m, name) == getattr(want, names[name]) for m in found for name in given)


def test_budgets_that_cannot_be_met_are_refused():
    config = tiny("llama").config
    with pytest.raises(SmeltError, match="parameters=1000000 is more than the model's"):
        Minitron(parameters=1_000_000).target(config)
    with pytest.raises(SmeltError, match="no shape has 100 parameters, give or take 5 %; the nearest has"):
        Minitron(parameters=100).target(config)
    with pytest.raises(SmeltError, match="no shape has"):
        Minitron(parameters=0.9, layers=1, hidden=32).target(config)
    with pytest.raises(SmeltError, match="'bert' models cannot be cut"):
        Minitron(parameters=0.5).target(tiny("bert").config)
    with pytest.raises(SmeltError):
        registry.parse("minitron(parameters=1.5)", "weights")
