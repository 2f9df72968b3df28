from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from smelt import registry
from smelt.data._tokens import Tokens
from smelt.distill._sampling import finish
from smelt.distill.dac_kl import DacKL
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.gkd import GKD
from smelt.distill.semantic_revision import SemanticRevision, corrected
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.train import Course, Training, teach

N, S, V, PROMPT, EOS, CONTEXT = 6, 10, 7, 4, 0, 16


def random_rows(seed):
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, V, (N, S), generator=made)
    student, teacher = (torch.randn(N, S - 1, V, generator=made, dtype=torch.float64) for _ in range(2))
    for i in range(2):  # a teacher that agrees everywhere: nothing to correct
        teacher[i] = 0
        teacher[i].scatter_(-1, tokens[i, 1:, None], 5.0)
    return tokens, student, teacher


def slow(tokens, student, teacher):
    p, q = teacher.softmax(-1), student.softmax(-1)
    made, known = tokens.clone(), []
    for i in range(N):
        best, at = -1.0, None
        for j in range(PROMPT, S):
            right = int(p[i, j - 1].argmax())
            apart = sum(float(a * (a / b).log()) for a, b in zip(p[i, j - 1], q[i, j - 1], strict=True))
            if right != tokens[i, j] and apart > best:
                best, at = apart, j
            if tokens[i, j] == EOS:
                break
        if at is not None:
            made[i, at] = p[i, at - 1].argmax()
        known.append(S if at is None else at + 1)
    return made, known


@pytest.mark.parametrize("seed", range(8))
def test_the_worst_of_the_tokens_the_teacher_would_not_say_is_corrected(seed):
    tokens, student, teacher = random_rows(seed)
    before = tokens.clone()
    made, known = corrected(tokens, student, teacher, PROMPT, EOS)
    expected, until = slow(tokens, student, teacher)
    assert torch.equal(made, expected) and known.tolist() == until
    assert torch.equal(tokens, before)
    assert known[:2].tolist() == [S, S] and torch.equal(made[:2], tokens[:2])
    log_p = teacher.log_softmax(-1)
    for i, at in enumerate(known.tolist()):
        if at < S or not torch.equal(made[i], tokens[i]):
            assert torch.equal(made[i, : at - 1], tokens[i, : at - 1])  # the prefix stands
            assert at - 1 >= PROMPT
            assert log_p[i, at - 2, made[i, at - 1]] > log_p[i, at - 2, tokens[i, at - 1]]


@pytest.fixture
def tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = np.random.default_rng(0).zipf(1.3, 4000).clip(max=320) - 1
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 4000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 4000, "bytes": 4000, "documents": 1, "dtype": "uint16"}))
    return Tokens(folder)


def small(seed):
    return tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed)


def taught(method, tokens, folder, steps=2, teacher=True):
    student, target = (Loaded(small(seed), tiny_tokenizer(), folder / str(seed)) for seed in (0, 7))
    settings = Training(tokens=steps * 4 * CONTEXT, context=CONTEXT, batch=4, lr=1e-2, save_seconds=1e9)
    log = teach(student, target if teacher else None, tokens, method, settings, folder, seed=3)
    return student.model, log


def test_without_corrections_it_is_gkd(tmp_path, tokens):
    one, log = taught(SemanticRevision(objective=ForwardKL(), corrections=0, prompt=4), tokens, tmp_path / "one")
    other, about = taught(GKD(objective=ForwardKL(), prompt=4), tokens, tmp_path / "other")
    two, more = taught(SemanticRevision(objective=ForwardKL(), prompt=4), tokens, tmp_path / "two")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(two.parameters(), other.parameters(), strict=True))
    assert log["flops"] == about["flops"] and more["flops"] > log["flops"]


def test_what_is_trained_on_is_the_sample_corrected_and_gone_on_with(tmp_path, tokens):
    """The rows of the first step against a sample taken, corrected and finished apart."""
    seen = []

    class Seeing:
        def fit(self, objective, change):
            row = torch.randint(2, 320, (3, CONTEXT + 1), generator=torch.Generator().manual_seed(1))
            inputs = {"input_ids": row[:, :-1], "labels": row[:, 1:], "row": torch.arange(3)}
            seen.append((inputs, change(inputs), change))
            return {"flops": 0}

    student, target = (Loaded(small(seed), tiny_tokenizer(), tmp_path / str(seed)) for seed in (0, 7))
    course = Course(student, (target,), tokens, Training(tokens=64, context=CONTEXT, batch=4), tmp_path)
    course.fit = Seeing().fit
    for corrections in (0, 1, 2):
        SemanticRevision(share=1.0, corrections=corrections, prompt=4).teach(course)
    sample, once, twice = (made["input_ids"] for _, made, _ in seen)
    whole = torch.cat([sample, seen[0][1]["labels"][:, -1:].clamp(min=0)], 1)
    assert torch.equal(once[:, :4], sample[:, :4]) and not torch.equal(once, sample) and not torch.equal(twice, once)
    with torch.no_grad():
        mine, theirs = (m(input_ids=whole[:, :-1]).logits for m in (student.model, target.model))
    fixed, known = corrected(whole, mine, theirs, 4, EOS)
    for i in range(3):
        stands = known[i] if known[i] < whole.shape[1] else whole.shape[1] - 1
        assert torch.equal(once[i, :stands], fixed[i, :stands])
    again = finish(student.model, fixed, known, 1.0, 0, EOS)
    assert again.shape == whole.shape


def test_defaults_and_what_is_refused(tmp_path, tokens):
    method = registry.parse("semantic_revision", "distill")
    assert method.objective == DacKL() and method.corrections == 1
    with pytest.raises(SmeltError, match="there is none"):
        taught(SemanticRevision(prompt=4), tokens, tmp_path, teacher=False)
    with pytest.raises(SmeltError, match="semantic_revision: it trains by an objective"):
        SemanticRevision(objective=GKD())
