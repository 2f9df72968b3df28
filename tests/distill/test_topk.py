from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from smelt.distill._teacher import supply
from smelt.distill._topk import Cached, TopK, fill, parse, unpack
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.reverse_kl import ReverseKL
from smelt.spec import SmeltError

V, T, ROWS = 320, 16, 11


class Few(torch.utils.data.Dataset):
    """A few random rows that know their number."""

    def __init__(self, count=ROWS, seed=0):
        self.ids = torch.randint(V, (count, T), generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index], "row": torch.tensor(index)}


def batch_of(rows, at):
    return torch.utils.data.default_collate([rows[i] for i in at])


@pytest.fixture
def online(model):
    return supply(model, ("teacher",))


def test_unpacked_it_is_the_teacher_on_its_best_tokens_and_uniform_on_the_others():
    logits = 3 * torch.randn(2, 3, 50)
    ids, log_p = TopK(8).pack(logits)
    got = unpack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_p), 50).double().exp()
    p = logits.double().softmax(-1)
    for i in range(2):
        for t in range(3):
            best = sorted(range(50), key=lambda v: -p[i, t, v])[:8]
            tail = 1 - sum(p[i, t, v].item() for v in best)
            for v in range(50):
                expected = p[i, t, v].item() if v in best else tail / 42
                assert got[i, t, v].item() == pytest.approx(expected, rel=2**-7)  # 11 bits of a logarithm up to 16
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, dtype=torch.float64), rtol=0, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tail_shared_as_the_student_does_is_one_bucket(dtype):
    """Forward KL and its gradient are those of k tokens and the rest as one; reverse KL likewise."""
    teacher, student = (3 * torch.randn(4, 3, 50) for _ in range(2))
    ids, log_p = TopK(8).pack(teacher)
    ids, log_p = torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_p)
    student = student.to(dtype).requires_grad_()
    before = student.detach().clone()
    dense = unpack(ids, log_p, 50, student)
    assert torch.equal(student, before) and not dense.requires_grad
    torch.testing.assert_close(dense.exp().sum(-1), torch.ones(4, 3, dtype=dense.dtype), rtol=0, atol=4e-3)
    q = student.double().softmax(-1)
    kept_q = q.gather(-1, ids.long())
    buckets_q = torch.cat([kept_q, 1 - kept_q.sum(-1, keepdim=True)], -1)
    p = log_p.double().exp()
    p = p / p.sum(-1, keepdim=True)
    for objective, slow in ((ForwardKL(), (p * (p / buckets_q).log()).sum(-1)), (ReverseKL(), (buckets_q * (buckets_q / p).log()).sum(-1))):
        loss = objective(student, dense.log_softmax(-1))
        near = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(loss.double(), slow, rtol=near, atol=near)
        (got,) = torch.autograd.grad(loss.sum(), student)
        (expected,) = torch.autograd.grad(slow.sum(), student, retain_graph=True)
        torch.testing.assert_close(got.double(), expected.double(), rtol=near, atol=near)


def test_a_cache_takes_the_students_tail_unless_told_otherwise(tmp_path, online):
    rows = Few()
    inputs = batch_of(rows, [3, 1]) | {"student": torch.randn(2, T, V)}
    cached = fill(TopK(4), online, rows, tmp_path, vocab=V)
    flat = fill(TopK(4, tail="uniform"), online, rows, tmp_path, vocab=V)  # the same folder: only reading differs
    plain = {name: value for name, value in inputs.items() if name != "student"}
    assert torch.equal(flat(inputs), cached(plain))
    assert not torch.allclose(flat(inputs), cached(inputs))
    kept = online(inputs)["teacher"].topk(4, -1).indices
    assert torch.equal(flat(inputs).gather(-1, kept), cached(inputs).gather(-1, kept))


def test_a_sampled_tail_is_the_teacher_in_the_mean_and_so_is_the_gradient_of_forward_kl():
    """Over all u, the systematic draws of each token are n p_v / tail in the mean, and never a whole draw away from it."""
    logits, student, draws = 2 * torch.randn(50).double(), torch.randn(50).double().requires_grad_(), 6
    p, kept = logits.softmax(-1), logits.topk(8).indices
    tail = p.clone()
    tail[kept] = 0
    grid = (torch.arange(4000) + 0.5) / 4000
    ids, log_p = TopK(8, tail="sampled", draws=draws).pack(logits.expand(4000, 50), grid)
    assert ids.shape == (4000, 8 + draws) and log_p.shape == (4000, 9)
    assert (np.diff(ids[:, 8:].astype(int)) >= 0).all() and not np.isin(ids[:, 8:], kept.numpy()).any()
    got = unpack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_p), 50)
    counts = got.double().exp().index_fill(-1, kept, 0.0) / tail.sum() * draws
    assert ((counts - tail / tail.sum() * draws).abs() < 1 + 1e-2).all()
    torch.testing.assert_close(got.double().exp().mean(0), p, rtol=4e-3, atol=1e-4)  # float16 of a logarithm, and the grid
    loss = ForwardKL()(student.expand(4000, 50), got.double()).mean()
    (slope,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(slope, student.detach().softmax(-1) - p, rtol=4e-3, atol=2e-4)


def test_a_sampled_tail_on_disk_follows_from_the_rows_alone(tmp_path, online):
    rows, asked = Few(), TopK(4, tail="sampled", draws=8)
    one = fill(asked, online, rows, tmp_path / "one", vocab=V, batch=1)
    all_at_once = fill(asked, online, rows, tmp_path / "all", vocab=V, batch=ROWS)
    assert (tmp_path / "one" / "ids.bin").stat().st_size == ROWS * T * 12 * 2
    assert np.array_equal(one.ids, all_at_once.ids)
    stats = one.stats()
    assert stats["bytes_per_token"] == asked.bytes_per_token(V) == 4 * (2 + 2) + 2 + 8 * 2
    assert stats["bytes"] == asked.bytes(ROWS, T, V)
    inputs = batch_of(rows, [3, 1])
    got = one(inputs | {"student": torch.randn(2, T, V)})  # which it does not look at
    assert torch.equal(got, one(inputs))
    assert ((got > -torch.inf).sum(-1) <= 12).all()
    torch.testing.assert_close(got.exp().sum(-1), torch.ones(2, T), rtol=0, atol=4e-3)
    other = fill(TopK(4), online, rows, tmp_path / "one", vocab=V)  # the same folder is begun anew
    assert other.ids.shape[-1] == 4


@pytest.mark.parametrize("asked", [TopK(1, tail="sampled"), TopK(20, tail="sampled", draws=3), TopK(64, tail="sampled")])
def test_a_sampled_tail_of_almost_no_mass(asked):
    sure = torch.full((1, 20), -200.0)
    sure[0, 3] = 200.0
    ids, log_p = asked.pack(sure)
    dense = unpack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_p), 20)
    assert dense.softmax(-1)[0, 3] > 1 - 1e-5 and not dense.isnan().any()


def test_a_sure_teacher_and_one_kept_whole():
    sure = torch.full((1, 20), -100.0)
    sure[0, 3] = 100.0
    for k in (1, 5, 20, 64):  # 64 of 20: all of them
        ids, log_p = TopK(k).pack(sure)
        assert ids.shape == (1, min(k, 20))
        dense = unpack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_p), 20)
        assert torch.isfinite(dense).all()
        assert dense.softmax(-1)[0, 3] > 1 - 1e-5
    nearly = torch.randn(1000, 20)
    nearly[:, 0] = -50.0  # the kept sum to 1, give or take the rounding of float32, which must not make a tail below zero
    ids, log_p = TopK(19).pack(nearly)
    assert (nearly.softmax(-1)[:, 1:].sum(-1) > 1).any()
    assert np.isfinite(log_p).all()
    logits = torch.randn(4, 20)
    ids, log_p = TopK(20).pack(logits)
    dense = unpack(torch.from_numpy(ids.astype(np.int32)), torch.from_numpy(log_p), 20)
    torch.testing.assert_close(dense, logits.log_softmax(-1), rtol=2**-11, atol=1e-6)


def test_bytes_are_the_formula(tmp_path, online):
    for k in (1, 7, 64):
        fill(TopK(k), online, Few(), tmp_path / str(k), vocab=V)
        size = sum((tmp_path / str(k) / name).stat().st_size for name in ("ids.bin", "log_p.bin", "sums.bin"))
        assert size == TopK(k).bytes(ROWS, T, V) == ROWS * (T * TopK(k).bytes_per_token(V) + 4)
        assert TopK(k).bytes_per_token(V) == k * (2 + 2) + 2
        assert TopK(k).bytes_per_token(65_537) == k * (4 + 2) + 2
        assert Cached(tmp_path / str(k)).stats()["bytes"] == size


def test_rows_come_back_in_any_order_and_the_stated_error_is_the_true_one(tmp_path, model, online):
    rows = Few()
    errors = []
    for k in (4, 32, V):
        cached = fill(TopK(k), online, rows, tmp_path / str(k), vocab=V, batch=1)  # one row a batch: every row is measured
        at = [7, 0, 7, 10]
        inputs = batch_of(rows, at)
        true, got = online(inputs)["teacher"], cached(inputs)
        kept = true.log_softmax(-1).topk(min(k, V), -1)
        torch.testing.assert_close(got.gather(-1, kept.indices), kept.values, rtol=2**-10, atol=1e-3)
        whole = batch_of(rows, range(ROWS))
        error = ForwardKL()(cached(whole), online(whole)["teacher"])
        stats = cached.stats()
        assert stats["measured"] == ROWS * T
        assert stats["kl"] == pytest.approx(error.mean().item(), rel=1e-3, abs=1e-7)
        p = online(whole)["teacher"].softmax(-1)
        tail = 1 - p.topk(min(k, V), -1).values.sum(-1)
        assert stats["tail"] == pytest.approx(tail.mean().item(), rel=1e-2, abs=1e-6)
        assert (error <= tail * math.log(max(V - k, 1)) + 2**-7).all()
        errors.append(stats["kl"])
    assert errors[0] > errors[1] > 1e3 * errors[2]


def test_other_rows_are_refused(tmp_path, online):
    cached = fill(TopK(4), online, Few(), tmp_path / "a", vocab=V)
    with pytest.raises(SmeltError, match="other rows"):
        cached(batch_of(Few(seed=1), [3]))
    with pytest.raises(SmeltError, match="other rows"):
        cached(batch_of(Few(count=ROWS + 1), [ROWS]))
    with pytest.raises(SmeltError, match="say their number"):
        cached({"input_ids": Few().ids[:1]})


def test_a_finished_cache_is_not_made_again_and_another_key_begins_anew(tmp_path, online):
    calls = []

    def counted(inputs):
        calls.append(len(inputs["input_ids"]))
        return online(inputs)

    fill(TopK(4), counted, Few(), tmp_path / "a", vocab=V, key="one", batch=4)
    assert calls == [4, 4, 3]
    fill(TopK(4), counted, Few(), tmp_path / "a", vocab=V, key="one", batch=4)
    assert calls == [4, 4, 3]
    for key, vocab in (("two", V), ("two", 300)):
        fill(TopK(4), lambda inputs, n=vocab: {"teacher": counted(inputs)["teacher"][..., :n]}, Few(), tmp_path / "a", vocab=vocab, key=key)
    assert sum(calls) == 3 * ROWS


SCRIPT = """
import sys, time
from pathlib import Path
import torch
from smelt.distill._topk import TopK, fill

class Rows:
    def __len__(self): return 60
    def __getitem__(self, i): return {"input_ids": torch.arange(16) * i % 320, "row": torch.tensor(i)}

def online(inputs):
    time.sleep(float(sys.argv[2]))
    return {"teacher": torch.sin(inputs["input_ids"][..., None] * torch.arange(1.0, 321)) * 4}

if __name__ == "__main__":
    fill(TopK(6), online, Rows(), Path(sys.argv[1]), vocab=320, batch=2, mark_seconds=0.0)
"""


def test_killed_it_goes_on_and_ends_the_same(tmp_path):
    here = {"__name__": "here"}
    exec(SCRIPT, here)

    def whole(folder):
        here["sys"] = SimpleNamespace(argv=["", "", "0"])
        return fill(TopK(6), here["online"], here["Rows"](), tmp_path / folder, vocab=V, batch=2)

    def mark():
        return json.loads((tmp_path / "cut" / "about.json").read_text())["done"] if (tmp_path / "cut" / "about.json").exists() else 0

    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "cut"), "0.05"], stderr=subprocess.DEVNULL)
    while mark() < 6 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert 6 <= mark() < 60
    with open(tmp_path / "cut" / "ids.bin", "ab") as file:
        file.write(b"half a row that no mark covers")
    assert whole("cut").about == whole("whole").about
    for name in ("about.json", "ids.bin", "log_p.bin", "sums.bin"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_disk_that_will_not_be_written_is_one_clear_line(tmp_path, online):
    (tmp_path / "file").write_text("")
    with pytest.raises(SmeltError, match="cannot be written"):
        fill(TopK(4), online, Few(), tmp_path / "file" / "cache", vocab=V)


def test_recipe_text():
    assert parse("topk(k=7)") == TopK(7)
    assert parse(" topk() ") == parse("topk") == TopK()
    for wrong, said in (
        ("topk(k=0)", "k is 0"),
        ("topk(k='a')", "k is 'a'"),
        ("topk(n=3)", "no parameter 'n'"),
        ("top(k=3)", "is not a cache"),
    ):
        with pytest.raises(SmeltError, match=said):
            parse(wrong)
    for hostile in ("topk(3)", "topk(k=__import__('os'))", "topk(**{})", "(", "", "topk(k=" * 3000):
        with pytest.raises(SmeltError):
            parse(hostile)
