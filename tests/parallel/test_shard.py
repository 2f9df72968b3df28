"""Training on two processes equals training on one: DDP and FSDP2 over gloo, cut in micro-batches or not, killed or not."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest
import torch

# one process imports, and forks for every rank of every job: the imports are what takes time
JOBS = """
import os, signal, sys, traceback
from pathlib import Path
import torch
import smelt._train_loop
from smelt.distill._teacher import supply
from smelt.distill._topk import TopK, fill
from smelt.distill.cross_entropy import CrossEntropy
from smelt.model._tiny import tiny
from smelt._train_loop import train
from smelt.train import Training, language_step

folder, ports = Path(sys.argv[1]), iter(sys.argv[2:])
torch.set_num_threads(1)
made = torch.Generator().manual_seed(0)
rows = [{name: torch.randint(320, (8,), generator=made) for name in ("input_ids", "labels")} for _ in range(32)]
for i, row in enumerate(rows):
    row["labels"][: i * 3 % 9] = -100  # unequal counts: a mean of means would be wrong
    row["row"] = torch.tensor(i)

def job(name, kill=False, fsdp=False, **more):
    model = tiny(layers=2, hidden=16, ffn=24, heads=2, kv_heads=1).double()
    settings = Training(tokens=4 * 8 * 8, context=8, batch=8, lr=1e-2, clip=0.5, save_seconds=1e-9, **more)
    plain = language_step(CrossEntropy(), ("student", "labels"))
    def step(model, inputs, progress):
        if kill and progress == 0.75:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(model, inputs, progress)
    log = train(model, rows, step, settings, folder / name.removesuffix("-killed"), fsdp=fsdp)
    about = {"weights": model.state_dict(), "log": log["log"], "resumed": log["resumed_at"]}
    torch.save(about, folder / f"{name}-{os.environ.get('RANK', 0)}.pt")

def held(name, **more):  # a projector, a state that follows the loss, no use for half the model, rows changed on the way
    model = tiny(layers=2, hidden=16, ffn=24, heads=2, kv_heads=1).double()
    torch.manual_seed(0)
    equipment = torch.nn.Linear(16, 16).double()
    equipment.register_buffer("seen", torch.zeros(()).double())
    def step(model, inputs, progress):
        out = model(input_ids=inputs["input_ids"], output_hidden_states=True, use_cache=False)
        loss = (equipment(out.hidden_states[1]) - 1).square().mean(-1) * (1 + equipment.seen)
        return loss, inputs["labels"] != -100
    def change(inputs):
        return inputs | {"labels": inputs["labels"].masked_fill(inputs["input_ids"] % 3 == 0, -100)}
    def after(steps, loss):
        equipment.seen.mul_(0.5).add_(loss)
    settings = Training(tokens=4 * 8 * 8, context=8, batch=8, lr=1e-2, clip=0.5, **more)
    log = train(model, rows, step, settings, folder / name, equipment=equipment, after=after, change=change, partial=True)
    about = {"weights": model.state_dict() | equipment.state_dict(), "log": log["log"]}
    torch.save(about, folder / f"{name}-{os.environ.get('RANK', 0)}.pt")

def cache(name):
    kept = fill(TopK(4), supply(tiny(), ("teacher",)), rows, folder / "cache", vocab=320, batch=2)
    torch.save(kept.about, folder / f"{name}-{os.environ['RANK']}.pt")

def on(world, work, *args, **more):
    port, children = next(ports), []
    for rank in range(world):
        children.append(os.fork())
        if not children[-1]:
            try:
                if world > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                smelt._train_loop.SAVING = 1e9
                work(*args, **more)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]

assert on(1, job, "one") == [0]
assert on(2, cache, "cache") == [0, 0]
assert on(1, held, "held-one") == [0]
assert on(2, held, "held") == on(2, held, "held-micro", micro=2) == [0, 0]
for name, fsdp in (("ddp", False), ("fsdp", True)):
    assert on(2, job, name, fsdp=fsdp) == [0, 0]
    assert on(2, job, f"{name}-micro", fsdp=fsdp, micro=2) == [0, 0]
    assert on(2, job, f"{name}-cut-killed", fsdp=fsdp, kill=True).count(0) == 0
    assert on(2, job, f"{name}-cut", fsdp=fsdp) == [0, 0]
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    sockets = [socket.socket() for _ in range(13)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [str(one.getsockname()[1]) for one in sockets]
    for one in sockets:
        one.close()
    ran = subprocess.run([sys.executable, "-c", JOBS, str(folder), *ports], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "[transformers]" not in ran.stderr
    return folder


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_learns(done, kind):
    one = torch.load(done / "one-0.pt")
    for name in (kind, f"{kind}-micro"):
        for rank in (0, 1):
            two = torch.load(done / f"{name}-{rank}.pt")
            for weight, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][weight], value, rtol=0, atol=1e-12)
            for a, b in zip(one["log"], two["log"], strict=True):
                assert {key: b[key] for key in a} == pytest.approx(a, rel=1e-6)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_killed_processes_go_on_with_the_same_bits(done, kind):
    for rank in (0, 1):
        whole, cut = torch.load(done / f"{kind}-{rank}.pt"), torch.load(done / f"{kind}-cut-{rank}.pt")
        assert whole["resumed"] == 0
        assert cut["resumed"] == 3
        assert cut["log"] == whole["log"]
        for weight, value in whole["weights"].items():
            assert torch.equal(cut["weights"][weight], value), weight


def test_two_processes_train_one_equipment_and_one_state(done):
    one = torch.load(done / "held-one-0.pt")
    assert one["weights"]["seen"] > 0
    for name in ("held", "held-micro"):
        for rank in (0, 1):
            two = torch.load(done / f"{name}-{rank}.pt")
            for weight, value in one["weights"].items():
                torch.testing.assert_close(two["weights"][weight], value, rtol=0, atol=1e-12, msg=weight)
            assert [b["loss"] for b in two["log"]] == pytest.approx([a["loss"] for a in one["log"]], rel=1e-6)


def test_one_of_two_processes_fills_the_cache_and_both_read_it(done):
    first, second = (torch.load(done / f"cache-{rank}.pt") for rank in (0, 1))
    assert first == second
    assert first["done"] == 32
