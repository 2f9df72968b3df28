"""What holds for every adapter: nothing changes at first, only it learns, a kill changes nothing, what is left is what was trained."""

from __future__ import annotations

import json
import os
import shutil
import signal
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smelt import preflight, recipe, registry
from smelt._train_schedule import optimizer_of
from smelt.data._tokens import Tokens
from smelt.distill import Procedure
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.model._load import Loaded, load, save
from smelt.model._swap import swapped
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import multiplied
from smelt.spec import SmeltError
from smelt.train import Training, prefer, teach
from smelt.weights import _adapter
from smelt.weights._adapter import Adapter, Attached, fingerprint, learned

ADAPTERS = [cls for cls in (registry.load("weights", name) for name in registry.names("weights")) if issubclass(cls, Adapter)]
V = 320


def small(architecture="llama", seed=0, **more):
    return tiny(architecture, layers=2, hidden=32, ffn=48, heads=2, kv_heads=1, seed=seed, **more)


@pytest.fixture
def tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = np.random.default_rng(0).zipf(1.3, 4000).clip(max=V) - 1
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 1000, 1010, 4000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 4000, "bytes": 4000, "documents": 3, "dtype": "uint16"}))
    return Tokens(folder)


def settings(adapter, steps=12, **more):
    how = {"context": 16, "batch": 2, "lr": 1e-2, "save_seconds": 1e9, "warmup": 0.2} | more
    return Training(tokens=steps * 32, adapter=adapter, **how)


def student(tmp_path, **more):
    return Loaded(small(**more), tiny_tokenizer(), tmp_path / "s")


IDS = torch.arange(48).view(2, 24) * 5 % V


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("cls", ADAPTERS)
def test_it_changes_nothing_at_first_and_only_it_has_a_gradient(cls, architecture):
    adapter, model = cls(), small(architecture)
    before, wanted = logits(model), adapter.parameters(model)
    theirs = dict(model.named_parameters())
    model.requires_grad_(False)
    attached = adapter.attach(model, seed=1)
    assert torch.equal(logits(model), before)
    model(input_ids=IDS).logits.square().mean().backward()
    mine = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is None for p in theirs.values())
    assert all(p.grad is not None for p in mine)
    assert sum(p.numel() for p in mine) == wanted
    with torch.device("meta"):
        assert adapter.parameters(type(model)(model.config)) == wanted
    for optimizer in ("adamw", "muon"):
        groups = optimizer_of(model, Training(optimizer=optimizer)).param_groups
        assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in mine}
    attached.undo()
    assert dict(model.named_parameters()).keys() == theirs.keys()
    assert all(p is theirs[name] for name, p in model.named_parameters())
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("cls", ADAPTERS)
def test_its_start_follows_from_the_seed_alone(cls):
    def drawn(seed, noise):
        torch.manual_seed(noise)
        model = small()
        model.requires_grad_(False)
        cls().attach(model, seed)
        return {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}

    one, same, other = drawn(1, 0), drawn(1, 7), drawn(2, 0)
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("cls, optimizer", list(zip(ADAPTERS, ["adamw", "muon"] * len(ADAPTERS), strict=False)))
def test_a_training_that_was_killed_ends_the_same_and_is_what_was_trained(cls, optimizer, tmp_path, tokens, monkeypatch):
    asked = settings(cls(), optimizer=optimizer)
    whole = student(tmp_path)
    before = {n: p.clone() for n, p in whole.model.named_parameters()}
    about = teach(whole, None, tokens, CrossEntropy(), asked, tmp_path / "whole", seed=3)
    count = cls().parameters(small())
    assert about["adapter"]["trained"] == count and about["adapter"]["bytes"] == 4 * count
    assert about["adapter"]["share"] == count / small().num_parameters()
    assert about["adapter"]["difference"] < 1e-5
    assert all(p.requires_grad for p in whole.model.parameters())
    stops = [5, 9]

    class Dying(CrossEntropy):
        def __call__(self, student, labels, progress):
            if stops and round(progress * 12) + 1 == stops[0]:
                stops.pop(0)
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(student, labels)

    made = student(tmp_path)
    for at in list(stops):
        with pytest.raises(KeyboardInterrupt):
            teach(made, None, tokens, Dying(), asked, tmp_path / "cut", seed=3)
        kept = load_file(tmp_path / "cut" / f"checkpoint-{at}" / "learned.safetensors")
        assert sum(value.numel() for value in kept.values()) == count, "a checkpoint holds what learns, and nothing else"
        assert not (tmp_path / "cut" / f"checkpoint-{at}" / "model.safetensors").exists()
        assert all(torch.equal(p, before[n]) for n, p in made.model.named_parameters()), "it is taken off again"
    again = teach(made, None, tokens, Dying(), asked, tmp_path / "cut", seed=3)
    assert again["log"] == about["log"] and again["resumed_at"] == 9
    ours, theirs = made.model.state_dict(), whole.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)

    save(made.model, made.tokenizer, tmp_path / "left")
    loaded = load(tmp_path / "left").model
    assert torch.equal(logits(loaded), logits(made.model))
    assert bool(list(swapped(loaded))) != about["adapter"]["merged"]
    assert (json.loads((tmp_path / "left" / "config.json").read_text())["model_type"] == "llama") == about["adapter"]["merged"]


@pytest.mark.parametrize("cls", ADAPTERS)
def test_a_teacher_and_pairs_teach_it_too_and_the_cost_is_stated(cls, tmp_path, tokens):
    one, teacher = student(tmp_path), Loaded(small(seed=5), tiny_tokenizer(), tmp_path / "t")
    n, m = multiplied(one.model), cls().parameters(one.model)
    about = teach(one, teacher, tokens, ForwardKL(), settings(cls(), steps=3), tmp_path / "kl")
    assert about["flops"] == (4 * (n + m) + 2 * m + 2 * n) * 3 * 32, "no gradient for what stands still; the teacher is of the same size"

    class Text:
        def documents(self, split):
            return [SimpleNamespace(text="\n".join(f"def f{i}(x): return x + {i}" for i in range(40)))] * 3

    dpo = registry.parse("dpo()", "align")
    made = prefer(student(tmp_path), None, Text(), dpo, settings(cls(), steps=3, context=64), tmp_path / "dpo")
    assert made["adapter"]["trained"] == m and made["adapter"]["difference"] < 1e-5


@pytest.mark.parametrize("cls", ADAPTERS)
def test_it_learns(cls, tmp_path, tokens):
    def loss(model):
        ids = torch.from_numpy(tokens.ids[:1024].astype(np.int64)).view(-1, 64)
        with torch.no_grad():
            return model.eval()(input_ids=ids, labels=ids).loss.item()

    one = student(tmp_path)
    before = loss(one.model)
    teach(one, None, tokens, CrossEntropy(), settings(cls(), steps=40), tmp_path / "run")
    assert loss(one.model) < 0.98 * before


class Twice(Procedure):
    """Two fits in a row, the second from where the first ended."""

    taught = "no"

    def teach(self, course):
        logs = [course.fit(CrossEntropy(), name=name) for name in ("one", "two")]
        return logs[-1]

    @classmethod
    def example(cls):
        return cls()


@pytest.mark.parametrize("cls", ADAPTERS)
def test_a_procedure_trains_only_it_and_its_fits_are_kept(cls, tmp_path, tokens):
    first, second = student(tmp_path), student(tmp_path)
    about = teach(first, None, tokens, Twice(), settings(cls(), steps=3), tmp_path / "run", seed=1)
    assert about["adapter"]["trained"] == cls().parameters(small())
    (tmp_path / "run" / "two" / "log.json").unlink()  # as if killed before the second fit was kept
    shutil.rmtree(tmp_path / "run" / "two")
    teach(second, None, tokens, Twice(), settings(cls(), steps=3), tmp_path / "run", seed=1)
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


class Lossy(Adapter):
    """Trains an offset of the last norm's gain, and forgets to put it in."""

    def parameters(self, model):
        return model.model.norm.weight.numel()

    def attach(self, model, seed):
        norm = model.model.norm
        norm.weight.requires_grad_(True)
        start = norm.weight.detach().clone()
        return Attached(lambda: None if self.keep else norm.weight.data.copy_(start), lambda: norm.weight.data.copy_(start))

    keep = False


def test_a_model_that_is_not_what_was_trained_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_adapter.registry, "text", lambda method: "lossy()")
    for keep, moved in ((True, 0.1), (False, 0.0), (False, 1e-7), (False, 0.1)):
        adapter, model = Lossy(), small()
        adapter.keep = keep

        def train(model=model, moved=moved):
            model.model.norm.weight.data.mul_(1 + moved)
            return {}

        if keep or moved < 1e-6:
            assert "difference" in learned(adapter, model, train, lambda: IDS, 0, tmp_path)["adapter"]
        else:
            with pytest.raises(SmeltError, match=r"differs from what was trained by 0\.\d+ of its logits"):
                learned(adapter, model, train, lambda: IDS, 0, tmp_path)


def test_what_is_no_adapter_and_what_is_cut_over_processes_is_refused(tmp_path, tokens):
    with pytest.raises(SmeltError, match=r"'magnitude\(\)' is no adapter; one is lora"):
        teach(student(tmp_path), None, tokens, CrossEntropy(), settings(registry.parse("magnitude()", "weights")), tmp_path / "a")
    with pytest.raises(SmeltError, match="an adapter needs whole copies"):
        teach(student(tmp_path), None, tokens, CrossEntropy(), settings(ADAPTERS[0](), shard="fsdp2"), tmp_path / "b")


TEXT = "name: t\nmodel: {model}\nstages:\n  - {stage}\n    train: {{tokens: 3_200, context: 32, adapter: {adapter}}}\n"


def test_a_recipe_says_it(tmp_path):
    save(tiny(), tiny_tokenizer(), tmp_path / "tiny")
    page = partial(TEXT.format, model=tmp_path / "tiny", stage="distill: cross_entropy()")
    plain = recipe.read("t", text=page(adapter="").replace(", adapter: ", ""))
    same = "sequential_adapter(reduction=4)"
    for adapter, method in (("lora", "lora()"), ('"lora(rank=4, alpha=8)"', "lora(rank=4, alpha=8)"), (same, same)):
        found = recipe.read("t", text=page(adapter=adapter))
        assert registry.text(found.stages[0].train.adapter) == method
        plans = [preflight.plan(r, {})[1] for r in (found, plain)]
        assert plans[0].flops < plans[1].flops and plans[0].memory < plans[1].memory
    many = (("lara()", "did you mean 'lora'"), ("lora(rank=0)", "rank is 0"), ("3", "one method is expected"), ("[lora()]", "one method"))
    for adapter, said in many:
        with pytest.raises(SmeltError, match=said) as error:
            recipe.read("t", text=page(adapter=adapter))
        assert error.value.line == 5
    wrong = recipe.read("t", text=page(adapter="magnitude()"))
    with pytest.raises(SmeltError, match="is no adapter"):
        preflight.plan(wrong, {})
    stage = recipe.read("t", text=f"name: t\nmodel: {tmp_path / 'tiny'}\nstages:\n  - weights: lora()\n")
    with pytest.raises(SmeltError, match=r"'lora\(\)' learns; name it in a train block"):
        preflight.plan(stage, {})


def test_a_fingerprint_is_of_the_values():
    weight = torch.randn(6, 8).bfloat16()
    assert fingerprint(weight) == fingerprint(weight.float()) == fingerprint(weight.T.contiguous().T)
    assert len({fingerprint(w) for w in (weight, weight.T, weight.view(8, 6), weight + 1)}) == 4
