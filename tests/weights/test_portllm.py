from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smelt.model._load import load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights._adapter import learned
from smelt.weights._merge import merge_folders
from smelt.weights.lora import Lora
from smelt.weights.portllm import PortLLM

IDS = torch.arange(48).view(2, 24) * 5 % 320


def moved(model, size, seed):
    """Every matrix is changed by `size` of its norm."""
    draw = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        change = torch.randn(p.shape, generator=draw)
        p.data.add_(change, alpha=float(size * p.data.norm() / change.norm()))
    return model


@pytest.fixture
def folders(tmp_path):
    """base, tuned (a lora, merged), evolved, and another model of the same shape."""
    save(tiny(), tiny_tokenizer(), tmp_path / "base")
    tuned = tiny()

    def train():
        for p in tuned.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.03)
        return {}

    learned(Lora(rank=4, alpha=12), tuned, train, lambda: IDS, 0, tmp_path)
    save(tuned, tiny_tokenizer(), tmp_path / "tuned")
    save(moved(tiny(), 0.2, 1), tiny_tokenizer(), tmp_path / "evolved")
    save(tiny(seed=7), tiny_tokenizer(), tmp_path / "other")
    return tmp_path


def port(folders, own, tuned, base="base", out="out", **more):
    method = PortLLM(tuned=str(folders / tuned), base=str(folders / base), **more)
    shutil.rmtree(folders / out, ignore_errors=True)
    merge_folders(method, [folders / own, *map(Path, method.models)], Path(method.base), folders / out, progress=None)
    return load_file(folders / out / "model.safetensors")


FILE = "adapter/adapter_model.safetensors"


@pytest.mark.parametrize("tuned", ["tuned", FILE])
def test_onto_its_own_base_it_is_the_tuned_model_bit_for_bit(folders, tuned):
    made, wanted = port(folders, "base", tuned), load_file(folders / "tuned" / "model.safetensors")
    assert made.keys() == wanted.keys() and all(torch.equal(made[n], wanted[n]) for n in made)
    start = load_file(folders / "base" / "model.safetensors")
    assert any(not torch.equal(made[n], start[n]) for n in made)


def test_it_is_exact_where_a_difference_would_round():
    base, tuned = torch.randn(50) * 1e4, torch.randn(50) * 1e-4
    assert not torch.equal(base + (tuned - base), tuned)
    assert torch.equal(PortLLM()("b", [base.clone(), tuned], base), tuned)


def test_the_file_and_the_merged_model_say_the_same(folders):
    one, other = port(folders, "evolved", "tuned"), port(folders, "evolved", FILE)
    base, tuned, evolved = (load_file(folders / n / "model.safetensors") for n in ("base", "tuned", "evolved"))
    for name in one:
        wanted = evolved[name].double() + tuned[name].double() - base[name].double()
        for made in (one, other):
            torch.testing.assert_close(made[name].double(), wanted, rtol=0, atol=1e-6)
    load(folders / "out")


@pytest.mark.parametrize("rank", [1, 3, 4, 5])
def test_a_rank_keeps_the_largest_singular_values(rank):
    base, evolved = torch.randn(40, 30), torch.randn(40, 30) * 0.01
    evolved = base + evolved
    tuned = base + 0.01 * torch.randn(40, 4) @ torch.randn(4, 30)
    made = PortLLM(rank=rank)("w", [evolved, tuned], base)
    u, s, v = torch.linalg.svd((tuned - base).double())
    wanted = evolved.double() + sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(rank))
    torch.testing.assert_close(made.double(), wanted, rtol=0, atol=1e-5)
    vector = [torch.randn(9) for _ in range(3)]
    torch.testing.assert_close(PortLLM(rank=rank)("b", vector[:2], vector[2]), vector[0] + vector[1] - vector[2])


def test_a_wrong_base_is_refused(folders):
    for own, tuned, base, who in (
        ("other", "tuned", "base", "the stage's own model"),
        ("evolved", "other", "base", "tuned="),
        ("evolved", "tuned", "other", "the stage's own model"),
        ("other", FILE, "base", "the stage's own model"),
    ):
        with pytest.raises(SmeltError, match=rf"of {who}.* lies 1\.\d\d of its norm from base=.*at most drift=0.5"):
            port(folders, own, tuned, base)
        assert not (folders / "out").exists()
    with pytest.raises(SmeltError, match=r"was learned on another 'model\.layers\.0.*' than that of base="):
        port(folders, "evolved", FILE, "evolved")
    with pytest.raises(SmeltError, match=r"lies 0\.20 of its norm from base=.*drift=0\.1\)"):
        port(folders, "evolved", "tuned", drift=0.1)
    port(folders, "other", "tuned", drift=2.0)  # said so


def test_shapes_and_tokenizers_are_refused_too(folders):
    save(tiny(ffn=128), tiny_tokenizer(), folders / "wide")
    with pytest.raises(SmeltError, match="intermediate_size=96"):
        port(folders, "wide", "tuned")
    save(tiny(), tiny_tokenizer(300), folders / "foreign")
    with pytest.raises(SmeltError, match="has another tokenizer"):
        port(folders, "foreign", "tuned")


def test_loras_that_are_more_than_two_factors_are_refused(folders):
    about = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    changes = ({"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 2}}, {"peft_type": "LOHA"}, {"r": 5})
    for change in changes:
        (folders / "adapter" / "adapter_config.json").write_text(json.dumps(about | change))
        (folders / FILE).touch()
        with pytest.raises(SmeltError, match=r"is not a plain lora|is not a pair A, B of rank 5"):
            port(folders, "evolved", FILE)
    (folders / "adapter" / "adapter_config.json").write_text(json.dumps(about))
    held = load_file(folders / FILE)
    save_file({name.replace("layers.1.", "layers.9."): value for name, value in held.items()}, folders / FILE)
    with pytest.raises(SmeltError, match=r"changes 'model\.layers\.9\..*', which .* has not"):
        port(folders, "evolved", FILE)
    (folders / FILE).write_bytes(b"nothing")
    with pytest.raises(SmeltError, match="cannot be read"):
        port(folders, "evolved", FILE)
    with pytest.raises(SmeltError, match=r"there is no such file"):
        port(folders, "evolved", "none/adapter_model.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
def test_alpha_and_rank_travel_with_the_patch_of_another_tool(folders, rslora):
    about = json.loads((folders / "adapter" / "adapter_config.json").read_text())
    held = load_file(folders / FILE)
    save_file(held, folders / FILE)  # without fingerprints
    (folders / "adapter" / "adapter_config.json").write_text(json.dumps(about | {"use_rslora": rslora, "lora_alpha": 6}))
    made, evolved = port(folders, "evolved", FILE), load_file(folders / "evolved" / "model.safetensors")
    for name in evolved:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        change = held[f"{key}.lora_B.weight"].double() @ held[f"{key}.lora_A.weight"].double() if f"{key}.lora_A.weight" in held else 0.0
        torch.testing.assert_close(made[name].double(), evolved[name].double() + 6 / (2 if rslora else 4) * change, rtol=0, atol=1e-6)
