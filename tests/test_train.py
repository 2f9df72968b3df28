from __future__ import annotations

import copy
import itertools
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

import smelt._train_loop
import smelt.train
from smelt._train_loop import train
from smelt._train_schedule import optimizer_of, rate
from smelt.data._tokens import Rows, Tokens
from smelt.distill import Procedure, Stateful
from smelt.distill.cross_entropy import CrossEntropy
from smelt.distill.ensemble import Ensemble
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.distill.weighted import Weighted
from smelt.model._load import Loaded, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import multiplied
from smelt.optim import Muon
from smelt.spec import SmeltError
from smelt.train import Course, Training, language_step, reads, teach

V = 320
QUIET = {"save_seconds": 1e9, "warmup": 0.2}


def small(seed=0, **more):
    return tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed, **more)


@pytest.fixture
def tokens(tmp_path):
    folder = tmp_path / "tokens"
    folder.mkdir()
    ids = np.random.default_rng(0).zipf(1.3, 4000).clip(max=V) - 1
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 1000, 1010, 4000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 4000, "bytes": 4000, "documents": 3, "dtype": "uint16"}))
    return Tokens(folder)


class Uneven(torch.utils.data.Dataset):
    """Rows whose labels are masked to very different lengths; one row has none at all."""

    def __init__(self, count, context=8):
        made = torch.Generator().manual_seed(0)
        self.ids = torch.randint(V, (count, context), generator=made)
        self.labels = torch.randint(V, (count, context), generator=made)
        for i in range(count):
            self.labels[i, : (i * 3) % (context + 1)] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


def plain(model, rows, settings):
    """The same training by hand: one batch a step, torch's own parts, nothing accumulated."""
    steps = settings.steps
    optimizer = optimizer_of(model, settings)
    losses = []
    model.train()
    for at in range(steps):
        batch = torch.utils.data.default_collate([rows[at * settings.batch + i] for i in range(settings.batch)])
        logits = model(input_ids=batch["input_ids"]).logits
        keep = batch["labels"] != -100
        loss = torch.nn.functional.cross_entropy(logits[keep], batch["labels"][keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * rate(at, steps, settings)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def same(a, b, tolerance=0.0):
    for (name, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")


def step_of(objective=None):
    return language_step(objective or CrossEntropy(), ("student", "labels"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_it_is_the_plain_loop_however_the_batch_is_cut(tmp_path, optimizer):
    rows = Uneven(24)
    settings = Training(tokens=4 * 6 * 8, context=8, batch=6, lr=3e-3, optimizer=optimizer, **QUIET)
    by_hand = small().double()
    losses = plain(by_hand, rows, settings)
    for micro in (6, 3, 1):
        model = small().double()
        log = train(model, rows, step_of(), Training(**{**vars(settings), "micro": micro}), tmp_path / str(micro))
        same(model, by_hand, 1e-9)
        assert [entry["loss"] for entry in log["log"]] == pytest.approx(losses, rel=1e-6)  # logged in float32
        assert [entry["step"] for entry in log["log"]] == [1, 2, 3, 4]
        assert [entry["lr"] for entry in log["log"]] == pytest.approx([settings.lr * rate(at, 4, settings) for at in range(4)])


def test_the_parts_of_a_model_go_to_the_right_optimizer():
    model = tiny("qwen2")
    muon = optimizer_of(model, Training(optimizer="muon"))
    assert isinstance(muon, Muon)
    matrices = {id(p) for p in muon.param_groups[0]["params"]}
    for name, p in model.named_parameters():
        assert (id(p) in matrices) == (p.dim() == 2 and "embed" not in name and "lm_head" not in name)
    for name in ("adamw", "muon"):
        groups = optimizer_of(model, Training(optimizer=name, weight_decay=0.3)).param_groups
        assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
        assert all((group["weight_decay"] == 0.3) == (p.dim() > 1) for group in groups for p in group["params"])


def test_learning_rates():
    for schedule, middle in (("cosine", 0.55), ("linear", 0.55), ("constant", 1.0)):
        settings = Training(schedule=schedule, warmup=0.1, floor=0.1)
        rates = [rate(at, 100, settings) for at in range(101)]
        assert rates[:10] == pytest.approx([(at + 1) / 10 for at in range(10)])
        assert rates[10] == 1.0
        assert rates[55] == pytest.approx(middle)
        assert rates[100] == pytest.approx(1.0 if schedule == "constant" else 0.1)
        assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, tokens, optimizer, monkeypatch):
    monkeypatch.setattr(smelt._train_loop, "ENTRIES", 12)  # of 50 steps: an entry is the mean of 4, and of 2 at the end
    settings = Training(tokens=50 * 8, context=8, batch=1, lr=1e-2, optimizer=optimizer, **QUIET)
    rows = Rows(tokens, 8, 50, seed=3)
    whole = small()
    expected = train(whole, rows, step_of(), settings, tmp_path / "whole", seed=3)
    stops = [7, 20, 50]

    def step(model, inputs, progress):
        if stops and round(progress * 50) + 1 == stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return step_of()(model, inputs, progress)

    model, handler = small(), signal.getsignal(signal.SIGINT)
    for at in list(stops):
        with pytest.raises(KeyboardInterrupt):
            train(model, rows, step, settings, tmp_path / "cut", seed=3)
        assert (tmp_path / "cut" / f"checkpoint-{at}" / "complete").exists()
        assert signal.getsignal(signal.SIGINT) is handler
        model = small(seed=9)  # another process would start from whatever it has
    got = train(model, rows, step, settings, tmp_path / "cut", seed=3)
    same(model, whole)
    assert got["log"] == expected["log"]
    assert [entry["step"] for entry in got["log"]] == [*range(4, 49, 4), 50]
    assert got["resumed_at"] == 50
    assert expected["resumed_at"] == 0
    about = json.loads((tmp_path / "cut" / "checkpoint-50" / "complete").read_text())
    assert got["seconds"] > about["seconds"] > 0


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch, smelt.train
from smelt._train_loop import train
from smelt.train import Course, Training, language_step
from smelt.distill import Procedure, Stateful
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._walk import multiplied
from smelt.model._tiny import tiny
import json, shutil, numpy as np

folder = Path(sys.argv[1])
torch.set_num_threads(1)
smelt._train_loop.SAVING = 1e9  # a checkpoint at every step
rows = [{"input_ids": torch.arange(i, i + 8) * 7 % 320, "labels": torch.arange(i, i + 8) * 5 % 320} for i in range(60)]

def attempt(optimizer, name, sabotage=None):
    settings = Training(tokens=10 * 2 * 8, context=8, batch=2, micro=1, lr=1e-2, optimizer=optimizer, save_seconds=1e-9)
    name = f"{optimizer}-{name}"
    pid = os.fork()
    if pid:
        return pid
    try:
        if sabotage:
            sabotage()
        model = tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1)
        log = train(model, rows, language_step(CrossEntropy(), ("student", "labels")), settings, folder / name)
        torch.save({"weights": model.state_dict(), "log": log["log"], "resumed": log["resumed_at"]}, folder / f"{name}.pt")
        os._exit(0)
    finally:
        os._exit(1)

def die(): os.kill(os.getpid(), signal.SIGKILL)

def within(module, name, call, half):
    '''SIGKILL in the `call`-th call of module.name, before it or with half of the file written.'''
    def sabotage():
        real, count = getattr(module, name), [0]
        def patched(*args, **more):
            count[0] += 1
            if count[0] == call:
                if half:
                    Path(args[1]).write_bytes(b"half")
                die()
            return real(*args, **more)
        setattr(module, name, patched)
    return sabotage

def ended(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

random.seed(1)
for optimizer in ("adamw", "muon"):
    began = time.monotonic()
    assert ended(attempt(optimizer, "whole")) == 0
    took = time.monotonic() - began
    loop = smelt._train_loop
    for where in ((torch, "save", 5, True), (loop, "_complete", 3, False), (shutil, "rmtree", 2, False), (os, "replace", 2, False)):
        assert ended(attempt(optimizer, "cut", within(*where))) == -signal.SIGKILL
    for _ in range(2):
        pid = attempt(optimizer, "cut")
        time.sleep(random.uniform(0.02, 0.3) * took)
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    assert ended(attempt(optimizer, "cut")) == 0
"""


def test_killed_at_any_moment_even_while_it_saves_it_ends_with_the_same_bits(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for optimizer in ("adamw", "muon"):
        whole, cut = (torch.load(tmp_path / f"{optimizer}-{name}.pt") for name in ("whole", "cut"))
        assert whole["resumed"] == 0 < cut["resumed"]
        assert cut["log"] == whole["log"]
        for name, value in whole["weights"].items():
            assert torch.equal(value, cut["weights"][name]), name


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path, tokens, monkeypatch):
    rows = Rows(tokens, 8, 12, seed=0)
    settings = Training(tokens=6 * 2 * 8, context=8, batch=2, **QUIET)
    for bad in (1, 4, 6):

        def step(model, inputs, progress, bad=bad):
            loss, keep = step_of()(model, inputs, progress)
            return (loss * math.nan if round(progress * 6) + 1 == bad else loss), keep

        with pytest.raises(SmeltError, match=f"the loss is nan at step {bad}; a lower lr usually helps"):
            train(small(), rows, step, settings, tmp_path / str(bad))
    monkeypatch.setattr(smelt._train_loop, "ENTRIES", 1)  # one entry at the end: the first step and the last are looked at all the same
    for bad, said in ((1, 1), (4, 6)):
        with pytest.raises(SmeltError, match=f"the loss is nan at step {said}"):
            train(small(), rows, partial(step, bad=bad), settings, tmp_path / f"late-{bad}")


def test_it_leaves_nothing_behind_and_says_nothing_but_its_progress(tmp_path, tokens, capfd, monkeypatch):
    rows = Rows(tokens, 8, 12, seed=0)
    settings = Training(tokens=6 * 2 * 8, context=8, batch=2, save_seconds=1e-9, precision="bf16")
    monkeypatch.setattr(smelt._train_loop, "SAVING", 1e9)
    model = small()
    before = dict(os.environ), transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled(), model.config.use_cache
    train(model, rows, step_of(), settings, tmp_path / "run", label="mine")
    after = dict(os.environ), transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled(), model.config.use_cache
    assert after == before
    assert not model.training
    out, err = capfd.readouterr()
    assert out == ""
    assert all(line.startswith("  mine: ") for line in err.splitlines())
    checkpoints = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert len(checkpoints) == 2  # older ones are removed
    fresh = small()
    fresh.load_state_dict(model.state_dict())
    ids = torch.randint(V, (1, 6))
    assert torch.equal(model(ids).logits, fresh(ids).logits)  # nothing of bf16 stays wrapped around it
    assert model(ids).logits.dtype == torch.float32


def test_a_bf16_training_does_not_change_the_fp32_one_after_it(tmp_path, tokens):
    rows = Rows(tokens, 8, 12, seed=0)
    models = []
    for name, precision in (("a", "fp32"), ("b", "bf16"), ("c", "fp32")):
        models.append(small())
        train(models[-1], rows, step_of(), Training(tokens=6 * 2 * 8, context=8, batch=2, precision=precision, **QUIET), tmp_path / name)
    same(models[0], models[2])
    with pytest.raises(AssertionError):
        same(models[0], models[1])


def test_sizes_that_do_not_fit_are_refused(tmp_path, tokens):
    with pytest.raises(SmeltError, match="batch=6 is not a multiple of micro=4"):
        train(small(), Uneven(6), step_of(), Training(batch=6, micro=4), tmp_path)
    with pytest.raises(SmeltError, match="muon needs whole matrices"):
        train(small(), Uneven(6), step_of(), Training(optimizer="muon"), tmp_path, fsdp=True)
    loaded = Loaded(small(), tiny_tokenizer(), tmp_path)
    with pytest.raises(SmeltError, match="context=512 is longer than the 256 positions of the student"):
        teach(loaded, None, tokens, CrossEntropy(), Training(context=512), tmp_path)
    with pytest.raises(SmeltError, match="context=200 is longer than the 128 positions of the teacher"):
        teach(loaded, Loaded(tiny(context=128), tiny_tokenizer(), tmp_path), tokens, ForwardKL(), Training(context=200), tmp_path)


def test_what_an_objective_may_read():
    assert reads(ForwardKL(), ("student", "teacher")) == ("student", "teacher")
    with pytest.raises(SmeltError, match="ForwardKL reads 'teacher', which training does not supply"):
        reads(ForwardKL(), ("student", "labels"))


def test_positions_without_a_label_are_not_computed():
    seen = {}

    class Spy:
        def __call__(self, student, teacher, labels, progress):
            seen.update(student=student, teacher=teacher, labels=labels, progress=progress)
            return labels.float()

    labels = torch.tensor([[3, -100, 5], [-100, -100, 1]])
    logits = torch.randn(2, 3, 7)
    step = language_step(Spy(), reads(Spy(), ("student", "teacher", "labels", "progress")), lambda inputs: {"teacher": logits + 1})
    loss, keep = step(lambda **kw: SimpleNamespace(logits=logits), {"input_ids": labels, "labels": labels}, 0.25)
    assert loss.tolist() == [3.0, 5.0, 1.0]
    assert keep.all()
    assert torch.equal(seen["student"], logits[labels != -100])
    assert torch.equal(seen["teacher"], logits[labels != -100] + 1)
    assert seen["progress"] == 0.25


def pair(tmp_path, **more):
    student, teacher = Loaded(small(), tiny_tokenizer(), tmp_path / "s"), Loaded(tiny(seed=5, **more), tiny_tokenizer(), tmp_path / "t")
    save(teacher.model, teacher.tokenizer, tmp_path / "t")
    return student, teacher


def test_a_teacher_without_weight_is_not_asked_and_the_other_teaches_as_if_alone(tmp_path, tokens):
    settings = Training(tokens=4 * 4 * 16, context=16, batch=4, lr=1e-2, boundaries="mask", **QUIET)
    (one, teacher), (two, mute) = pair(tmp_path), pair(tmp_path)
    mute.model.forward = None  # whoever asks fails
    alone = teach(one, teacher, tokens, ForwardKL(), settings, tmp_path / "alone")
    beside = teach(two, (mute, teacher), tokens, Ensemble(weights=(0.0, 2.0)), settings, tmp_path / "beside")
    same(one.model, two.model)
    assert alone["flops"] == beside["flops"]


def test_a_student_comes_nearer_to_its_teacher_and_the_cost_is_stated(tmp_path, tokens):
    student, teacher = pair(tmp_path)
    settings = Training(tokens=30 * 4 * 16, context=16, batch=4, lr=1e-2, **QUIET)
    before = copy.deepcopy(teacher.model.state_dict())
    log = teach(student, teacher, tokens, ForwardKL(), settings, tmp_path / "run", seed=1)
    assert log["log"][-1]["loss"] < 0.9 * log["log"][0]["loss"]
    assert log["warnings"] == []
    counts = [sum(p.numel() for p in loaded.model.parameters()) for loaded in (student, teacher)]  # tied: the embedding is the head
    assert log["tokens"] == 30 * 4 * 16
    assert log["flops"] == (6 * counts[0] + 2 * counts[1]) * log["tokens"]
    for name, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[name])
    untied = tiny(tie_word_embeddings=False)
    assert multiplied(untied) == sum(p.numel() for p in untied.parameters()) - untied.get_input_embeddings().weight.numel()


def test_a_teacher_kept_whole_on_disk_teaches_like_the_one_in_memory_and_is_asked_once(tmp_path, tokens, monkeypatch):
    settings = {"tokens": 5 * 4 * 16, "context": 16, "batch": 4, "lr": 1e-2, "boundaries": "mask", **QUIET}
    models, logs = [], []
    for name, teacher_is in (
        ("online", "x"),
        ("cached", {"model": "x", "cache": f"topk(k={V})"}),
        ("again", {"model": "x", "cache": f"topk(k={V})"}),
    ):
        student, teacher = pair(tmp_path)
        if name == "again":
            monkeypatch.setattr(teacher.model, "forward", None)  # whoever asks fails
        logs.append(
            teach(
                student,
                teacher,
                tokens,
                ForwardKL(),
                Training(teacher=teacher_is, **settings),
                tmp_path / name,
                cache_folder=tmp_path / "kept",
            )
        )
        models.append(student.model)
    assert logs[0]["log"][0]["loss"] == pytest.approx(logs[1]["log"][0]["loss"], rel=1e-3)
    start, online, cached = ([p.flatten() for p in model.parameters()] for model in (pair(tmp_path)[0].model, models[0], models[1]))
    moved, apart = (torch.cat([a - b for a, b in zip(online, other, strict=True)]).norm() for other in (start, cached))
    assert apart < 0.02 * moved
    same(models[1], models[2])
    assert logs[1]["cache"] == logs[2]["cache"]
    assert logs[1]["cache"]["bytes_per_token"] == V * 4 + 2
    assert logs[0]["flops"] == logs[1]["flops"] == logs[2]["flops"]
    student, teacher = pair(tmp_path)
    other = Training(teacher={"model": "x", "cache": "topk(k=8)"}, **settings)
    assert teach(student, teacher, tokens, ForwardKL(), other, tmp_path / "other", cache_folder=tmp_path / "kept")["cache"]["kl"] > 1e-3
    assert len(list((tmp_path / "kept").iterdir())) == 2
    drawn = Training(teacher={"model": "x", "cache": "topk(k=8, tail='sampled', draws=24)"}, **settings)
    log = teach(student, teacher, tokens, ForwardKL(), drawn, tmp_path / "drawn", cache_folder=tmp_path / "kept")
    assert log["cache"]["bytes_per_token"] == 8 * 4 + 2 + 24 * 2 and len(list((tmp_path / "kept").iterdir())) == 3
    with pytest.raises(SmeltError, match=r"reverse_kl\(\) is infinite.*tail='student'"):
        teach(student, teacher, tokens, ReverseKL(), drawn, tmp_path / "refused", cache_folder=tmp_path / "kept")
    both = Weighted(objectives=[ForwardKL(), ForwardKL(temperature=2.0)], weights=[0.5, 0.5])  # takes keywords only
    assert teach(student, teacher, tokens, both, drawn, tmp_path / "both", cache_folder=tmp_path / "kept")["tokens"]


class Mixed:
    """Cross-entropy and a teacher's term of any weight: the mistake of two easydistill issues is a small one."""

    def __init__(self, weight):
        self.weight = weight

    def __call__(self, student, teacher, labels):
        return CrossEntropy()(student, labels) + self.weight * ForwardKL()(student, teacher)


def test_what_looks_wrong_is_said(tmp_path, tokens):
    settings = Training(tokens=4 * 4 * 16, context=16, batch=4, **QUIET)
    student, teacher = pair(tmp_path)
    for weight, count in ((10.0, 0), (1.0, 0), (1e-3, 1), (0.0, 1)):
        said = teach(Loaded(small(), *student[1:]), teacher, tokens, Mixed(weight), settings, tmp_path / str(weight))["warnings"]
        assert len(said) == count
        assert all("its term of the loss is negligible" in text for text in said)
    twin = Loaded(small(), *student[1:])
    frozen = teach(student, twin, tokens, ForwardKL(), Training(**{**vars(settings), "lr": 1e-30, "weight_decay": 0.0}), tmp_path / "same")[
        "warnings"
    ]
    assert len(frozen) == 2
    assert "they are the same model" in frozen[0]
    assert "the gradient was exactly zero up to step 3" in frozen[1]
    broken = copy.deepcopy(teacher.model)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(SmeltError, match="nan"):
        teach(Loaded(small(), *student[1:]), Loaded(broken, *teacher[1:]), tokens, ForwardKL(), settings, tmp_path / "nan")


def test_warnings_outlive_a_kill(tmp_path, tokens):
    student, teacher = pair(tmp_path)
    settings = Training(tokens=4 * 4 * 16, context=16, batch=4, **QUIET)
    expected = teach(Loaded(small(), *student[1:]), teacher, tokens, Mixed(0.0), settings, tmp_path / "whole")["warnings"]

    class Stopping(Mixed):
        def __call__(self, student, teacher, labels):
            if student.shape == (4, 16, V):  # not the look at the first few positions
                os.kill(os.getpid(), signal.SIGINT)
            return super().__call__(student, teacher, labels)

    with pytest.raises(KeyboardInterrupt):
        teach(Loaded(small(), *student[1:]), teacher, tokens, Stopping(0.0), settings, tmp_path / "cut")
    got = teach(Loaded(small(), *student[1:]), teacher, tokens, Mixed(0.0), settings, tmp_path / "cut")
    assert got["resumed_at"] == 1
    assert got["warnings"] == expected != []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, when its compiler is first imported
def test_compiled_it_learns_the_same_and_the_next_training_is_not_compiled(tmp_path, tokens):
    models = []
    for compiled in (False, True, False):
        student, teacher = pair(tmp_path)
        settings = Training(tokens=4 * 4 * 16, context=16, batch=4, compile=compiled, **QUIET)
        teach(student, teacher, tokens, ForwardKL(), settings, tmp_path / str(len(models)))
        models.append(student.model)
    same(models[0], models[1], 1e-4)
    same(models[0], models[2])
    assert not any(key.startswith("ACCELERATE_DYNAMO") for key in os.environ)


class Leaning(Stateful):
    """An objective with a projector that is trained and a state that follows the loss: (loss, progress) of every step."""

    def equipment(self, student, teacher):
        made = torch.nn.Linear(16, 16, bias=False)
        torch.nn.init.eye_(made.weight)
        made.register_buffer("seen", torch.zeros(3))
        return made

    def after(self, equipment, loss, progress):
        equipment.seen = equipment.seen * 0.5 + torch.tensor([loss, progress, 1.0])

    def __call__(self, student, labels, student_hidden, teacher_hidden, equipment):
        apart = (equipment(student_hidden[-1]) - teacher_hidden[-1]).square().mean(-1)
        return CrossEntropy()(student, labels) + (1 + equipment.seen[0]) * apart


def leaning(tmp_path, tokens, name, **more):
    student, teacher = pair(tmp_path, layers=1, hidden=16, ffn=24, heads=2, kv_heads=1)
    settings = Training(**{"tokens": 6 * 4 * 16, "context": 16, "batch": 4, "lr": 1e-2, **QUIET, **more})
    kept = {}

    class Kept(Leaning):
        def equipment(self, *sides):
            kept["made"] = super().equipment(*sides)
            return kept["made"]

    log = teach(student, teacher, tokens, Kept(), settings, tmp_path / name)
    return student.model, kept["made"], log


def test_equipment_is_trained_and_its_state_follows_whole_steps(tmp_path, tokens):
    torch.manual_seed(3)
    model, made, log = leaning(tmp_path, tokens, "whole")
    assert not torch.equal(made.weight, torch.eye(16))
    expected = torch.zeros(3)
    for entry in log["log"]:
        expected = expected * 0.5 + torch.tensor([entry["loss"], entry["step"] / 6, 1.0])
    torch.testing.assert_close(made.seen, expected)
    parts_of, made_of_parts, _ = leaning(tmp_path, tokens, "micro", micro=1)  # one state per optimizer step, not per micro-batch
    same(model, parts_of, 1e-4)
    torch.testing.assert_close(made_of_parts.seen, made.seen, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_training_goes_on_with_its_equipment(tmp_path, tokens, monkeypatch, optimizer):
    model, made, _ = leaning(tmp_path, tokens, "whole", optimizer=optimizer)
    monkeypatch.setattr(smelt._train_loop, "SAVING", 1e9)
    ended = smelt._train_loop._Watch.on_step_end

    def killed(self, args, state, control, **kwargs):
        ended(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(smelt._train_loop._Watch, "on_step_end", killed)
        leaning(tmp_path, tokens, "cut", optimizer=optimizer, save_seconds=1e-9)
    again, made_again, log = leaning(tmp_path, tokens, "cut", optimizer=optimizer, save_seconds=1e-9)
    assert log["resumed_at"] == 3
    same(model, again)
    same(made, made_again)


class Asked(Procedure):
    """Two fits and two questions; counts what it asked."""

    taught = "text"

    def __init__(self, stop=False):
        self.stop = stop

    def teach(self, course):
        first = course.fit(CrossEntropy(), name="first")
        answers = course.ask(["def f(", "import "], new=5, temperature=1.0, times=2)
        assert len(answers) == 4
        if self.stop:
            raise KeyboardInterrupt
        again = course.fit(ForwardKL(), name="second")
        return again | {"answers": answers, "first": first["log"]}

    @classmethod
    def example(cls):
        return cls()


def test_a_procedure_goes_on_where_it_was_and_asks_nothing_twice(tmp_path, tokens, monkeypatch):
    settings = Training(tokens=4 * 4 * 16, context=16, batch=4, lr=1e-2, **QUIET)
    student, teacher = pair(tmp_path)
    whole = teach(student, teacher, tokens, Asked(), settings, tmp_path / "whole")
    cut, teacher = pair(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        teach(cut, teacher, tokens, Asked(stop=True), settings, tmp_path / "cut")
    cut, teacher = pair(tmp_path)
    monkeypatch.setattr(teacher.model, "generate", None)  # whoever asks fails
    went = teach(cut, teacher, tokens, Asked(), settings, tmp_path / "cut")
    assert went["answers"] == whole["answers"]
    assert went["first"] == whole["first"]
    same(student.model, cut.model)
    with pytest.raises(SmeltError, match="asks a teacher and there is none"):
        teach(pair(tmp_path)[0], None, tokens, Asked(), settings, tmp_path / "none")


def test_samples_follow_from_their_seed_and_leave_the_model_as_it_was(tmp_path, tokens):
    student, _ = pair(tmp_path)
    course = Course(student, (), tokens, Training(context=16), tmp_path)
    student.model.train()
    state = torch.get_rng_state()
    with course.generating() as generate:
        ids = torch.randint(2, V, (3, 5))
        torch.set_rng_state(state)
        one, two, other, greedy = (generate(ids, 8, t, s) for t, s in ((1.0, 1), (1.0, 1), (1.0, 2), (0.0, 1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert student.model.training
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(one[:, :5], ids)
    logits = student.model.eval()(input_ids=greedy[:, :-1]).logits
    assert torch.equal(logits[:, 4].argmax(-1), greedy[:, 5])


def test_rows_changed_on_the_way_count_what_they_keep(tmp_path):
    """Half the labels masked by `change`: the same training as on rows that were masked from the start, however it is cut."""

    def masked(inputs):
        return inputs | {"labels": inputs["labels"].masked_fill(torch.arange(8) < 3 + inputs["labels"][:, 7:] % 3, -100)}

    class Masked(Uneven):
        def __getitem__(self, index):
            return {
                name: value[0] for name, value in masked({name: value[None] for name, value in super().__getitem__(index).items()}).items()
            }

    settings = {"tokens": 4 * 6 * 8, "context": 8, "batch": 6, "lr": 3e-3, **QUIET}
    expected = small().double()
    log = train(expected, Masked(24), step_of(), Training(**settings), tmp_path / "fixed")["log"]
    for micro in (6, 2):
        model = small().double()
        got = train(model, Uneven(24), step_of(), Training(**settings, micro=micro), tmp_path / f"changed{micro}", change=masked)["log"]
        same(model, expected, 1e-9)
        assert [entry["loss"] for entry in got] == pytest.approx([entry["loss"] for entry in log], rel=1e-6)
