"""What all trained drafts share: files and refusals, the layer with its memory, the tree, and the training over a still target."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import smelt._train_loop
from smelt import pipeline, preflight, registry
from smelt._train_loop import train
from smelt.data._tokens import Rows, Tokens
from smelt.decode._learned import FILE, Learned, target_digest
from smelt.decode._loop import Choice
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._load import Loaded, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import multiplied
from smelt.recipe import Training, read
from smelt.runtime import bind
from smelt.spec import SmeltError
from smelt.train import draft, language_step

NAMES = [n for n in registry.names("decode") if issubclass(registry.load("decode", n), Learned)]
V = 320


@pytest.fixture
def tokens(tmp_path):
    """Text that mostly counts: after a comes a + 1."""
    folder = tmp_path / "tokens"
    folder.mkdir()
    chance = np.random.default_rng(0)
    jumps = np.where(chance.random(6000) < 0.1, chance.integers(0, 40, 6000), 1)
    (2 + np.cumsum(jumps) % 40).astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 6000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 6000, "bytes": 6000, "documents": 1, "dtype": "uint16"}))
    return Tokens(folder)


def target(tmp_path, **more) -> Loaded:
    return Loaded(tiny(**{"layers": 2, "hidden": 32, "ffn": 48, "heads": 2, "kv_heads": 1, **more}), tiny_tokenizer(), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_what_does_not_fit_is_refused_by_name(name, tmp_path):
    loaded = target(tmp_path)
    save(loaded.model, loaded.tokenizer, tmp_path / "target")
    method = registry.load("decode", name)()
    with pytest.raises(SmeltError, match="has to be trained; give it 'train:"):
        method.drafter(loaded.model, loaded.tokenizer)
    free = method.untrained(tmp_path / "target", tmp_path / "free")
    other = target(tmp_path, seed=1)
    free.drafter(other.model, other.tokenizer)  # it was trained for none
    held = free.read(loaded.model, None)
    method.write(held, tmp_path / "free", loaded.model, loaded.tokenizer)
    free.drafter(loaded.model, loaded.tokenizer)
    free.drafter(loaded.model.to(torch.bfloat16), loaded.tokenizer)
    with pytest.raises(SmeltError, match="trained for another model"):
        free.drafter(other.model, other.tokenizer)
    with pytest.raises(SmeltError, match="another tokenizer"):
        free.drafter(loaded.model, tiny_tokenizer(300))
    with pytest.raises(SmeltError, match=r"for another target or other settings: '.*' is \("):
        free.drafter(target(tmp_path, hidden=64).model, loaded.tokenizer)
    for wrong in [other for other in NAMES if other != name]:
        with pytest.raises(SmeltError, match=f"is one of '{name}'"):
            registry.load("decode", wrong)(weights=free.weights).drafter(loaded.model, loaded.tokenizer)
    with pytest.raises(SmeltError, match=f"there is no {FILE}"):
        registry.load("decode", name)(weights=str(tmp_path / "nowhere")).drafter(loaded.model, loaded.tokenizer)
    (tmp_path / "free" / FILE).write_bytes(b"x" * 100)
    with pytest.raises(SmeltError, match="cannot be read"):
        free.drafter(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_training_leaves_the_target_alone_and_its_cost_is_stated(name, tmp_path, tokens):
    loaded = target(tmp_path)
    before = {key: value.clone() for key, value in loaded.model.state_dict().items()}
    method, settings = registry.load("decode", name)(), Training(tokens=8 * 4 * 16, context=16, batch=4, lr=1e-2, save_seconds=1e9)
    log = draft(loaded, tokens, method, settings, tmp_path / "run", tmp_path / "result")
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training
    made = method.module(loaded.model.config)
    assert log["flops"] == (2 * (multiplied(loaded.model) - V * 32) + method.cost(made, loaded.model.config)) * 512
    assert log["draft_parameters"] == sum(p.numel() for p in made.parameters())
    assert log["log"][-1]["loss"] < log["log"][0]["loss"]
    type(method)(weights=str(tmp_path / "result")).drafter(loaded.model, loaded.tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_training_ends_with_the_same_bits(name, tmp_path, tokens, monkeypatch):
    method, settings = registry.load("decode", name)(), Training(tokens=6 * 4 * 16, context=16, batch=4, save_seconds=1e-9)
    whole = draft(target(tmp_path), tokens, method, settings, tmp_path / "a", tmp_path / "whole")
    inner, seen = smelt._train_loop._Watch.on_step_end, []

    def dies(self, *args, **more):
        inner(self, *args, **more)
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(smelt._train_loop._Watch, "on_step_end", dies)
    with pytest.raises(KeyboardInterrupt):
        draft(target(tmp_path), tokens, method, settings, tmp_path / "b", tmp_path / "cut")
    monkeypatch.undo()
    cut = draft(target(tmp_path), tokens, method, settings, tmp_path / "b", tmp_path / "cut")
    assert cut["resumed_at"] >= 1 and whole["resumed_at"] == 0
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_what_a_draft_cannot_be_trained_with_is_refused(tmp_path, tokens, monkeypatch):
    method = registry.load("decode", NAMES[0])()
    for more, said in (
        ({"teacher": {"model": "base"}}, "leave out 'teacher'"),
        ({"adapter": object()}, "leave out 'adapter'"),
        ({"shard": "fsdp2"}, "one process"),
        ({"boundaries": "mask"}, "boundaries=mask"),
        ({"context": 2}, "needs 3 or more"),
        ({"context": 512}, "longer than the 256"),
    ):
        settings = Training(**{"tokens": 64, "context": 16, "batch": 4, **more})
        with pytest.raises(SmeltError, match=said):
            draft(target(tmp_path), tokens, method, settings, tmp_path / "run", tmp_path / "result")


def test_the_digest_knows_a_model_by_its_first_embeddings_and_sizes():
    model = tiny()
    first = target_digest(model)
    assert target_digest(tiny()) == first == target_digest(tiny().to(torch.bfloat16))
    model.get_input_embeddings().weight.data[3, 3] += 1
    assert len({first, target_digest(model), target_digest(tiny(layers=1)), target_digest(tiny(seed=1))}) == 4


RECIPE = """\
name: drafts
model: {folder}/tiny
data: "{folder}/text*.txt"
stages:
  - decode: [{trained}, prompt_lookup(), "{name}(form='chain')"]
    train: {{tokens: 512, context: 32, batch: 4}}
evaluate: [latency(prompt=16, new=8)]
"""


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_trains_a_draft_once_and_binds_it(name, tmp_path):
    loaded = target(tmp_path)
    save(loaded.model, loaded.tokenizer, tmp_path / "tiny")
    for n in range(40):
        (tmp_path / f"text{n}.txt").write_text(f"def f{n}(x):\n    return x + {n}\n" * 40)
    file = tmp_path / "r.yaml"
    file.write_text(RECIPE.format(folder=tmp_path, name=name, trained=f"{name}()"))
    plans = {plan.name: plan for plan in preflight.plan(read(file), {})}
    assert plans[name].flops > 0 == plans["prompt_lookup"].flops
    results = pipeline.run(file, folder=tmp_path / "runs")
    first, second, third = results["stages"]
    assert third["reused"] and third["folder"] == first["folder"]  # a chain drafts with the same weights
    place = tmp_path / "runs" / "drafts" / first["folder"]
    assert (place / FILE).is_file() and first["log"] and not first["reused"] and second["folder"] is None
    assert results["variants"][1]["metrics"]["tokens_per_call"]["value"] >= 1.0
    again = pipeline.run(file, folder=tmp_path / "runs")
    assert again["stages"][0]["reused"]
    with bind(loaded.model, decode=results["variants"][1]["text"], tokenizer=loaded.tokenizer):
        made = loaded.model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=6, pad_token_id=1)
    assert made.tolist() == loaded.model.generate(torch.tensor([[5, 6, 7]]), do_sample=False, max_new_tokens=6, pad_token_id=1).tolist()
    changed = pipeline.run(file, folder=tmp_path / "runs", overrides={"train.lr": "0.01"})
    assert not changed["stages"][0]["reused"] and changed["stages"][0]["digest"] != first["digest"]


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_says_what_is_missing_with_its_line(name, tmp_path):
    train = "\n    train: {tokens: 512, context: 32}"
    for stage, said in (
        (f"{name}()", "is a draft that learns; give it 'train:"),
        (f"\"{name}(weights='somewhere')\"{train}", "has been trained; leave out its weights"),
        (f"prompt_lookup(){train}", "a decode stage takes no 'train:' block"),
    ):
        with pytest.raises(SmeltError, match=said) as caught:
            read("r.yaml", text=f"name: r\nmodel: embedded\nstages:\n  - decode: {stage}\n")
        assert str(caught.value).startswith("r.yaml:")


def test_a_cache_that_has_read_text_already_is_continued(tmp_path):
    """States before the call's own are unknown: the draft starts behind them, and the text is the target's."""
    loaded = target(tmp_path, eos_token_id=None, bos_token_id=None, pad_token_id=None)
    save(loaded.model, loaded.tokenizer, tmp_path / "target")
    ids = torch.randint(2, V, (1, 12), generator=torch.Generator().manual_seed(0))
    for name in NAMES:
        method = registry.load("decode", name)().untrained(tmp_path / "target", tmp_path / name)
        with torch.no_grad():
            cache = loaded.model(ids[:, :7], use_cache=True).past_key_values
            plain = loaded.model.generate(ids, do_sample=False, max_new_tokens=12)
            given = {"past_key_values": cache, **method.arguments(loaded.model, loaded.tokenizer)}
            assert loaded.model.generate(ids, do_sample=False, max_new_tokens=12, **given).tolist() == plain.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_says_the_targets_next_token_more_often_than_a_table_of_pairs(name, tmp_path):
    """A target trained on rows of three that repeat: what comes next stands three tokens back, where no pair can see it."""
    chance = np.random.default_rng(0)
    text = chance.integers(0, 24, 3).tolist()
    while len(text) < 60_000:
        text.append(text[-3] if chance.random() > 0.05 else int(chance.integers(24)))
    (tmp_path / "tokens").mkdir()
    np.asarray(text, np.uint16).tofile(tmp_path / "tokens" / "ids.bin")
    np.array([0, len(text)]).tofile(tmp_path / "tokens" / "starts.bin")
    about = {"tokens": len(text), "bytes": len(text), "documents": 1, "dtype": "uint16"}
    (tmp_path / "tokens" / "tokens.json").write_text(json.dumps(about))
    tokens, loaded = Tokens(tmp_path / "tokens"), target(tmp_path, hidden=64, ffn=96, vocab=32, initializer_range=0.05)
    settings = Training(tokens=200 * 16 * 32, context=32, batch=16, lr=5e-3, save_seconds=1e9)
    rows = Rows(tokens, 32, settings.steps * 16, 0)
    train(loaded.model, rows, language_step(CrossEntropy(), ("student", "labels")), settings, tmp_path / "target")
    cls = registry.load("decode", name)
    log = draft(loaded, tokens, cls(), settings, tmp_path / "run", tmp_path / "draft")["log"]
    assert log[-1]["loss"] < 0.7 * log[0]["loss"]
    grower = cls(weights=str(tmp_path / "draft")).drafter(loaded.model, loaded.tokenizer)
    pairs = np.zeros((24, 24))
    np.add.at(pairs, (text[:50_000], text[1:50_001]), 1)
    right = table = 0
    with torch.no_grad():
        for start in range(50_000, 50_000 + 60 * 33, 33):
            said = text[start : start + 20]
            out = loaded.model(torch.tensor([said]), output_hidden_states=True)
            said = [*said, int(out.logits[0, -1].argmax())]
            theirs = int(loaded.model(torch.tensor([said])).logits[0, -1].argmax())
            grower.begin(said, Choice([], False))
            grower.kept(said, 0, out.hidden_states[-1][0])
            right += int(grower.draft(said, 1).tokens[0]) == theirs
            table += int(pairs[said[-1]].argmax()) == theirs
    assert right >= table + 6, (right, table)  # of 60: ten points above it
