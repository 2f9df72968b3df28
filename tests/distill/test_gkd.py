from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.data._tokens import Tokens
from smelt.distill._sampling import Sampler
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.generalized_jsd import GeneralizedJSD
from smelt.distill.gkd import GKD
from smelt.distill.reverse_kl import ReverseKL
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import multiplied
from smelt.spec import SmeltError
from smelt.train import FLAT, Training, language_step, reads, teach

V, CONTEXT = 320, 16


def small(seed=0):
    return tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed)


@pytest.fixture
def tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = np.random.default_rng(0).zipf(1.3, 4000).clip(max=V) - 1
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 4000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 4000, "bytes": 4000, "documents": 1, "dtype": "uint16"}))
    return Tokens(folder)


def taught(method, tokens, folder, steps=3, taught_by=True, **more):
    student, target = (Loaded(small(seed), tiny_tokenizer(), folder / str(seed)) for seed in (0, 7))
    settings = Training(tokens=steps * 4 * CONTEXT, context=CONTEXT, batch=4, lr=1e-2, save_seconds=1e9, **more)
    log = teach(student, target if taught_by else None, tokens, method, settings, folder, seed=3)
    return student.model, log


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_defaults_of_the_paper():
    method = registry.parse("gkd", "distill")
    assert method.objective == GeneralizedJSD(beta=0.5) and method.share == 0.5 and method.temperature == 1.0
    assert registry.text(GKD(objective=ReverseKL(), share=1.0)) == "gkd(objective=reverse_kl(), share=1.0)"


def test_without_samples_it_is_plain_distillation(tmp_path, tokens):
    plain, log = taught(ForwardKL(), tokens, tmp_path / "plain")
    none, log_none = taught(GKD(objective=ForwardKL(), share=0.0, prompt=4), tokens, tmp_path / "none")
    some, _ = taught(GKD(objective=ForwardKL(), share=0.5, prompt=4), tokens, tmp_path / "some")
    assert same(plain, none) and not same(plain, some)
    assert log_none["flops"] == log["flops"]


def test_the_gradient_is_that_of_the_ids_fed_back_as_constants():
    """Nothing flows through sampling: the step with sampling inside equals the step on its frozen samples."""
    student, teacher, objective = small(), small(7), GeneralizedJSD()
    inputs = {"input_ids": torch.randint(2, V, (3, CONTEXT)), "labels": torch.randint(2, V, (3, CONTEXT)), "row": torch.arange(3)}

    def write(start, new, temperature, seed):
        rows = start
        draw = torch.Generator().manual_seed(seed)
        for _ in range(new):  # with a graph, were anybody to use it
            p = (student(input_ids=rows).logits[:, -1] / temperature).softmax(-1)
            rows = torch.cat([rows, torch.multinomial(p, 1, generator=draw)], 1)
        return rows

    change = Sampler(write, 0, 0, share=1.0, prompt=5)
    supplied = lambda given: {"teacher": teacher(input_ids=given["input_ids"]).logits.detach()}  # noqa: E731

    def gradient(given, change):
        student.zero_grad()
        step = language_step(objective, reads(objective, FLAT), supplied)
        loss, _ = step(student, change(given) if change else given, 0.5)
        loss.sum().backward()
        return loss.detach(), [p.grad.clone() for p in student.parameters()]

    frozen = {name: value.detach().clone() for name, value in change(inputs).items()}
    loss, through = gradient(inputs, change)
    loss_frozen, again = gradient(frozen, None)
    assert torch.equal(loss, loss_frozen)
    assert all(torch.equal(a, b) for a, b in zip(through, again, strict=True))
    _, data = gradient(inputs, None)
    assert not all(torch.equal(a, b) for a, b in zip(through, data, strict=True))


def test_it_learns_on_its_own_text(tmp_path, tokens):
    """On-policy, the divergence on samples of the student falls."""

    def apart(model):
        teacher = small(7)
        start = torch.randint(2, V, (16, 4), generator=torch.Generator().manual_seed(5))
        torch.manual_seed(0)
        rows = model.generate(start, max_new_tokens=12, do_sample=True, top_k=0, pad_token_id=0, attention_mask=torch.ones_like(start))
        with torch.no_grad():
            return ForwardKL()(model(input_ids=rows).logits, teacher(input_ids=rows).logits)[:, 4:].mean().item()

    before = apart(small())
    after, log = taught(GKD(objective=ForwardKL(), share=1.0, prompt=4), tokens, tmp_path, steps=40)
    assert apart(after) < 0.8 * before
    assert log["log"][-1]["loss"] < log["log"][0]["loss"]


def test_flops_count_the_samples(tmp_path, tokens):
    _, plain = taught(ForwardKL(), tokens, tmp_path / "plain")
    model, log = taught(GKD(objective=ForwardKL(), share=0.25, prompt=4, new=6), tokens, tmp_path / "gkd")
    assert log["flops"] - plain["flops"] == pytest.approx(2 * multiplied(model) * 0.25 * 3 * 4 * (4 + 6))


def test_decoding_that_takes_tokens_back_and_caches_serve_the_samples(tmp_path, tokens):
    models = []
    for name, how in (("plain", {}), ("lookup", {"decode": registry.parse("prompt_lookup(tokens=3)", "decode")}),
                      ("window", {"cache": registry.load("cache", "sink_window").example()})):  # fmt: skip
        model, log = taught(GKD(objective=ForwardKL(), share=1.0, prompt=4, **how), tokens, tmp_path / name, steps=2)
        assert log["steps"] == 2 and "generate" not in vars(model)
        models.append(model)
    assert not same(models[0], models[1])  # other draws, row by row


def test_objectives_that_read_no_teacher_and_a_teacher_that_is_cached(tmp_path, tokens):
    _, log = taught(GKD(objective=CrossEntropy(), share=1.0, prompt=4), tokens, tmp_path / "alone", taught_by=False)
    assert log["steps"] == 3
    with pytest.raises(SmeltError, match="leave out 'cache'"):
        taught(GKD(prompt=4), tokens, tmp_path / "cached", teacher={"model": "base", "cache": "topk(k=8)"})
    with pytest.raises(SmeltError, match="there is none"):
        taught(GKD(prompt=4), tokens, tmp_path / "none", taught_by=False)
    with pytest.raises(SmeltError, match="share"):
        registry.parse("gkd(share=1.5)", "distill")
