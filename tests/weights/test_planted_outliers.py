from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from smelt.compress import compress, save_compressed
from smelt.model._load import load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights.planted_outliers import PlantedOutliers

DECODERS = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3"]
IDS = torch.arange(2, 50).view(2, 24)


@pytest.mark.parametrize("architecture", DECODERS)
def test_the_function_is_unchanged_and_the_model_given_is_left_alone(architecture):
    model = tiny(architecture, layers=3)
    before = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        made = PlantedOutliers()(model, [])
        assert_close(made(IDS).logits, model(IDS).logits, rtol=0, atol=2e-4)
        if not architecture.startswith("gemma"):
            assert torch.equal(PlantedOutliers(factor=16.0)(model, [])(IDS).logits, model(IDS).logits), "a power of 2 is exact"
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())
    assert made.config.to_dict() == PlantedOutliers().target(model.config).to_dict() == model.config.to_dict()


def test_equals_multiplying_by_hand(model, plant):
    """The fixture of the other tests is the slow reference: the same draw of channels, written out."""
    made, want = PlantedOutliers(channels=5, factor=7.0, seed=3)(model, []), plant(model, channels=5, factor=7.0, seed=3)
    for (name, a), (_, b) in zip(made.named_parameters(), want.named_parameters(), strict=True):
        assert_close(a, b, rtol=1e-6, atol=0, msg=name)
    changed = [(a != b).sum().item() for a, b in zip(made.parameters(), model.parameters(), strict=True) if a.dim() == 1]
    assert changed == [5, 5, 5, 5, 0], "both norms of each block, not the last norm"


def test_inputs_of_the_consumers_have_outliers(model):
    largest = {}
    for name, factor in (("plain", 1.0), ("planted", 20.0)):
        made = PlantedOutliers(factor=factor)(model, [])
        hook = made.model.layers[1].mlp.up_proj.register_forward_pre_hook(
            lambda m, a, name=name: largest.update({name: a[0].square().mean((0, 1)).sqrt()})
        )
        with torch.no_grad():
            made(IDS)
        hook.remove()
    ratio = largest["planted"] / largest["plain"]
    assert_close(ratio.sort().values, torch.tensor([1.0] * 58 + [20.0] * 6), rtol=1e-4, atol=0)


def test_seeds_choose_channels(model):
    gains = [PlantedOutliers(seed=seed)(model, []).model.layers[0].input_layernorm.weight for seed in (0, 0, 1)]
    assert torch.equal(gains[0], gains[1]) and not torch.equal(gains[0], gains[2])


def test_in_a_run_it_is_saved_and_loaded_as_any_model(model, tmp_path):
    made, report = compress(model, None, PlantedOutliers(), [], progress=None)
    assert report["parameters_before"] == report["parameters_after"] and report["shape_before"] == report["shape_after"]
    save_compressed(made, tiny_tokenizer(), tmp_path, report)
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(IDS).logits, made(IDS).logits)


def test_refusals(model):
    for nothing in (PlantedOutliers(channels=0), PlantedOutliers(factor=1.0)):
        with pytest.raises(SmeltError, match="planted_outliers changed nothing"):
            compress(model, None, nothing, [], progress=None)
    with pytest.raises(SmeltError, match="channels=65 is more than the model's 64"):
        PlantedOutliers(channels=65).target(model.config)
    with pytest.raises(SmeltError, match="BertLayer: no mlp"):
        PlantedOutliers()(tiny("bert"), [])
