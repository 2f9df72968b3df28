"""Laws of every objective, whatever it is called: run through the step and the reduction of the training loop.

And of every procedure: the same course twice gives the same weights, and so does one that was killed in between.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import smelt._train_loop
from smelt import registry
from smelt._train_loop import kept_mean
from smelt.data._tokens import tokenize
from smelt.data.files import Files
from smelt.distill import FLAT, READS, Equipped, Procedure
from smelt.model._load import Loaded, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.train import Training, language_step, reads, teach

B, T, V, D, LAYERS, HEADS, KV = 2, 5, 320, 16, 2, 2, 1
METHODS = {name: registry.parse(name, "distill") for name in registry.names("distill")}
STUDENT, TEACHER = (
    Loaded(tiny(layers=LAYERS, hidden=D, ffn=24, heads=HEADS, kv_heads=KV, seed=seed), tiny_tokenizer(), None) for seed in (1, 2)
)


@pytest.fixture(params=[name for name, method in METHODS.items() if not isinstance(method, Procedure)])
def objective(request):
    return METHODS[request.param]


def positional(objective):
    """May it be called on any slice of the positions?"""
    return set(reads(objective, READS)) <= set(FLAT)


class Stub(torch.nn.Module):
    """A model whose logits, hidden states and projections are its parameters."""

    def __init__(self, logits, hidden, projected):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())
        self.hidden = torch.nn.ParameterList(h.clone() for h in hidden)
        self.projected = torch.nn.ParameterList(x.clone() for layer in projected for x in layer)

    def forward(self, input_ids, use_cache, output_hidden_states, **extra):
        return SimpleNamespace(logits=self.logits, hidden_states=tuple(self.hidden) if output_hidden_states else None)

    def layers(self):
        return tuple(tuple(self.projected[i : i + 3]) for i in range(0, len(self.projected), 3))


def tensors(seed=0, scale=2.0, dtype=torch.float32):
    """{student, teacher, ...}: all that can be read, of a student and a teacher of one tokenizer."""
    made = torch.Generator().manual_seed(seed)

    def random(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=made, dtype=dtype)

    have = {"student": random(B, T, V, scale=scale), "teacher": random(B, T, V, scale=scale)}
    have["teachers"] = (have["teacher"], random(B, T, V, scale=scale))
    for side, loaded in (("student", STUDENT), ("teacher", TEACHER)):
        have[f"{side}_hidden"] = tuple(random(B, T, D) for _ in range(LAYERS + 1))
        have[f"{side}_projected"] = tuple(tuple(random(B, T, n * D // HEADS) for n in (HEADS, KV, KV)) for _ in range(LAYERS))
        have[f"{side}_head"] = loaded.model.get_output_embeddings().weight.detach().to(dtype)
        have[f"{side}_embedding"] = loaded.model.get_input_embeddings().weight.detach().to(dtype)
    labels = torch.randint(V, (B, T), generator=made)
    labels[0, 3:] = labels[1, 0] = -100
    return have | {"labels": labels}


def placed(have):
    """What the loop makes of labels and ids."""
    labels, keep = have["labels"].clamp(min=0), have["labels"] != -100
    ids = dict.fromkeys(("student_ids", "teacher_ids", "teacher_labels"), labels)
    return have | ids | {"weights": torch.ones(B), "labels": labels, "keep": keep, "teacher_keep": keep, "progress": 0.5}


def equipped(objective, dtype=torch.float32):
    if not isinstance(objective, Equipped):
        return None
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = objective.equipment(STUDENT, TEACHER)
        return made if made is None else made.to(dtype)


def loss_of(objective, have, equipment=None):
    """(loss, gradients by name) of one micro-batch that is the whole step."""
    reading = reads(objective, READS)
    model = Stub(have["student"], have["student_hidden"], have["student_projected"])
    equipment = equipped(objective, have["student"].dtype) if equipment is None else equipment
    given = {name: value for name, value in placed(have).items() if name.startswith("teacher") and name in reading}

    def also():
        held = {name: have[name] for name in ("student_head", "student_embedding")}
        return held | {"student_projected": model.layers(), "equipment": equipment}

    step = language_step(objective, reading, lambda inputs: given, also=also)
    loss, keep = step(model, {"input_ids": have["labels"].clamp(min=0), "labels": have["labels"]}, 0.5)
    total = kept_mean(loss, keep, (have["labels"] != -100).sum())
    total.backward()
    return total.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_masked_positions_change_nothing(objective):
    have = tensors()
    loss, gradient = loss_of(objective, have)
    masked = have["labels"] == -100
    for rubbish in (1e4, float("inf"), -float("inf"), float("nan")) if positional(objective) else (1e4, -1e4):
        other = {name: have[name].masked_fill(masked[..., None], rubbish) for name in ("student", "teacher")}
        other["teachers"] = tuple(x.masked_fill(masked[..., None], rubbish) for x in have["teachers"])
        again, gradient_again = loss_of(objective, have | other)
        assert torch.equal(loss, again)
        for name, value in gradient.items():
            assert torch.equal(value, gradient_again[name])
            if name == "logits":
                assert not value[masked].any()


def test_gradient_is_finite_and_not_zero(objective):
    for scale in (1e-3, 1.0, 30.0, 1e4):
        loss, gradient = loss_of(objective, tensors(scale=scale))
        assert torch.isfinite(loss)
        assert gradient
        assert all(torch.isfinite(value).all() for value in gradient.values())
        if scale == 1.0:
            assert any(value.any() for value in gradient.values())


def test_zero_at_the_teacher_where_it_says_so(objective):
    reading = reads(objective, READS)
    if not any(name.startswith("teacher") for name in reading):
        assert not inspect.getattr_static(type(objective), "zero_at_teacher", False)
        return
    have = tensors(dtype=torch.float64)
    have |= {name: have[name.replace("teacher", "student")] for name in have if name.startswith("teacher_")}
    have |= {"teacher": have["student"], "teachers": (have["student"], have["student"])}
    loss, gradient = loss_of(objective, have)
    says = inspect.getattr_static(type(objective), "zero_at_teacher")
    assert bool(abs(loss) < 1e-12 and all(value.abs().max() < 1e-12 for value in gradient.values())) is says


def test_any_leading_shape(objective):
    if not positional(objective):
        return
    reading, have, equipment = reads(objective, READS), placed(tensors()), equipped(objective)

    def at(cut):
        made = {"equipment": equipment} if "equipment" in reading else {}
        for name in set(reading) - {"equipment"}:
            value = have[name]
            made[name] = tuple(map(cut, value)) if isinstance(value, tuple) else cut(value) if isinstance(value, torch.Tensor) else value
        return objective(**made)

    whole = at(lambda x: x)
    assert whole.shape == (B, T)
    torch.testing.assert_close(at(lambda x: x.flatten(0, 1)).view(B, T), whole)
    if inspect.getattr_static(type(objective), "whole_batch", False):
        return  # its positions are compared with each other
    for i in range(B):
        for t in range(T):
            torch.testing.assert_close(at(lambda x, i=i, t=t: x[i, t]), whole[i, t])


def test_one_loss_per_position_in_at_least_float32(objective):
    reading = reads(objective, READS)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        have = placed(tensors(dtype=dtype)) | {"equipment": equipped(objective, dtype)}
        loss = objective(**{name: have[name] for name in reading})
        assert loss.shape == (B, T)
        assert loss.dtype == expected


def test_inputs_are_left_as_they_were_and_the_teacher_learns_nothing(objective):
    reading, have = reads(objective, READS), placed(tensors())

    def leaves(value):
        return [x for item in value for x in leaves(item)] if isinstance(value, tuple) else [value]

    floating = {name: leaves(have[name]) for name in reading if name in have and name != "progress"}
    floating = {name: [x.requires_grad_() for x in found if x.is_floating_point()] for name, found in floating.items()}
    before = {name: [x.detach().clone() for x in found] for name, found in floating.items()}
    loss = objective(**{name: (have | {"equipment": equipped(objective)})[name] for name in reading})
    if loss.requires_grad:
        loss.sum().backward()
    for name, found in floating.items():
        for now, then in zip(found, before[name], strict=True):
            assert torch.equal(now, then)
            if name.startswith("teacher"):
                assert now.grad is None or not now.grad.any(), name


# procedures


@pytest.fixture(params=[name for name, method in METHODS.items() if isinstance(method, Procedure)])
def procedure(request):
    return type(METHODS[request.param]).example()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Forty texts of one module each, as files."""
    folder = tmp_path_factory.mktemp("corpus")
    for index, file in enumerate(sorted(Path(inspect.__file__).parent.glob("*.py"))[:40]):
        (folder / f"{index}.txt").write_text(file.read_text(encoding="utf-8")[:4000], encoding="utf-8")
    return Files(str(folder / "*.txt"), validation=0.2, test=0.2)


def weights_after(procedure, folder, corpus):
    """The student after the procedure, on two tiny models and the text of the standard library."""
    student = Loaded(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), tiny_tokenizer(), folder / "student")
    teacher = Loaded(tiny(layers=2, hidden=16, ffn=24, heads=2, kv_heads=1, seed=7), tiny_tokenizer(), folder / "teacher")
    if not (folder / "teacher").exists():
        save(teacher.model, teacher.tokenizer, folder / "teacher")
    tokens = tokenize(corpus, "train", tiny_tokenizer(), folder / "tokens")
    teacher_name = None if procedure.taught == "no" else "base"
    settings = Training(
        data=corpus, tokens=6 * 4 * 32, context=32, batch=4, lr=1e-2, save_seconds=1e-9, teacher=teacher_name and {"model": teacher_name}
    )
    log = teach(student, teacher if teacher_name else None, tokens, procedure, settings, folder / "course", seed=3)
    assert log["log"], "a procedure returns the log of its training"
    return student.model.state_dict()


def test_a_procedure_repeats_itself_killed_or_not(procedure, tmp_path, corpus, monkeypatch):
    whole = weights_after(procedure, tmp_path / "whole", corpus)
    start = tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1).state_dict()
    assert any(not torch.equal(whole[name], start[name]) for name in start), "it learned nothing"
    monkeypatch.setattr(smelt._train_loop, "SAVING", 1e9)  # a checkpoint after every step
    ended = smelt._train_loop._Watch.on_step_end
    for stop in (1, 3):

        def killed(self, args, state, control, stop=stop, **kwargs):
            ended(self, args, state, control, **kwargs)
            if state.global_step == stop + 1:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(smelt._train_loop._Watch, "on_step_end", killed)
            with pytest.raises(KeyboardInterrupt):
                weights_after(procedure, tmp_path / "cut", corpus)
    again = weights_after(procedure, tmp_path / "cut", corpus)
    for name in whole:
        assert torch.equal(whole[name], again[name]), name
