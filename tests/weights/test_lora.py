from __future__ import annotations

import json
import warnings

import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.testing import assert_close

from smelt.model._tiny import tiny
from smelt.model._walk import linears
from smelt.spec import SmeltError
from smelt.weights._adapter import fingerprint, learned
from smelt.weights.lora import Lora

IDS = torch.arange(48).view(2, 24) * 5 % 320


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(method, model, place, size=0.05):
    """As after a training: A and B are anything."""
    seen = {}

    def train():
        draw = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data.copy_(size * torch.randn(p.shape, generator=draw))
        seen.update({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, logits=logits(model))
        return {}

    return learned(method, model, train, lambda: IDS, 0, place) | {"seen": seen}


@pytest.mark.parametrize("method", [Lora(), Lora(rank=3, alpha=5), Lora(rank=2, maps=("q_proj", "v_proj"))])
def test_the_merged_weight_is_the_product_by_hand(method, tmp_path):
    model = tiny("llama")
    before = {n: m.weight.double() for _, n, m in linears(model)}
    about = trained(method, model, tmp_path)
    chosen = [n for n in before if not method.maps or n.split(".")[-1] in method.maps]
    assert about["adapter"]["trained"] == sum(method.rank * sum(before[n].shape) for n in chosen)
    for _, name, module in linears(model):
        wanted = before[name].clone()
        if name in chosen:
            a, b = (about["seen"][f"{name}.lora_{side}.default.weight"].double() for side in "AB")
            for i in range(wanted.shape[0]):
                for r in range(method.rank):
                    wanted[i] += method.alpha / method.rank * b[i, r] * a[r]
        assert_close(module.weight.double(), wanted, rtol=0, atol=1e-6)
    assert_close(logits(model), about["seen"]["logits"], rtol=1e-4, atol=1e-4)
    assert not hasattr(model, "peft_config") and {type(m) for _, _, m in linears(model)} == {torch.nn.Linear}


def test_merging_and_taking_it_out_again_is_a_round_trip():
    model = tiny("llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    tuner = peft.LoraModel(model, {"default": peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "down_proj"])}, "default")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(std=0.05)
    tuner.merge_adapter()
    moved = {n.replace(".base_layer", ""): p.clone() for n, p in model.named_parameters() if "lora_" not in n}
    assert any((moved[n] - before[n]).abs().max() > 1e-2 for n in before)
    tuner.unmerge_adapter()
    for name, p in tuner.unload().named_parameters():
        assert_close(p, before[name], rtol=0, atol=1e-6)


def test_what_is_kept_beside_it_is_what_peft_reads(tmp_path):
    model = tiny("qwen2")
    weights = {n: m.weight.clone() for _, n, m in linears(model)}
    about = trained(Lora(rank=4, alpha=12), model, tmp_path)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"], config["base_model_name_or_path"]) == (4, 12, "LORA", None)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert len(load_file(tmp_path / "adapter" / "adapter_model.safetensors")) == 2 * len(weights)
    with safe_open(tmp_path / "adapter" / "adapter_model.safetensors", "pt") as file:
        base = json.loads(file.metadata()["smelt.base"])
    assert base == {f"{n}.weight": fingerprint(w) for n, w in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft asks transformers for what it calls deprecated
        theirs = peft.PeftModel.from_pretrained(tiny("qwen2"), tmp_path / "adapter")
    assert torch.equal(logits(theirs), about["seen"]["logits"])


def test_the_same_training_leaves_the_same_files(tmp_path):
    for place in ("a", "b"):
        trained(Lora(), tiny("llama"), tmp_path / place)
    a, b = (tmp_path / place / "adapter" for place in "ab")
    assert (a / "adapter_config.json").read_bytes() == (b / "adapter_config.json").read_bytes()
    with safe_open(a / "adapter_model.safetensors", "pt") as one, safe_open(b / "adapter_model.safetensors", "pt") as two:
        assert one.metadata() == two.metadata() and list(one.keys()) == list(two.keys())
        assert all(torch.equal(one.get_tensor(name), two.get_tensor(name)) for name in one.keys())  # noqa: SIM118


def test_what_cannot_be_is_refused(tmp_path):
    with pytest.raises(SmeltError, match="no linear map inside the blocks is called 'q_pro'; did you mean 'q_proj'"):
        Lora(maps=("q_pro",)).parameters(tiny("llama"))
    with pytest.raises(SmeltError, match="cannot be merged"):
        trained(Lora(), tiny("llama"), tmp_path, size=float("nan"))
