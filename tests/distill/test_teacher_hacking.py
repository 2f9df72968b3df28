from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import smelt._train_loop
import smelt.distill.teacher_hacking
from smelt import registry
from smelt.data._tokens import Rows, Tokens
from smelt.distill.forward_kl import ForwardKL
from smelt.distill.gkd import GKD
from smelt.distill.teacher_hacking import Repeated, TeacherHacking, distances, outside, verdict
from smelt.model._load import Loaded, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model._walk import multiplied
from smelt.spec import SmeltError
from smelt.train import Training, teach

V, CONTEXT, STEPS = 320, 16, 6


def small(seed=0):
    return tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed)


def stream(folder, seed):
    folder.mkdir()
    ids = np.random.default_rng(seed).zipf(1.3, 2000).clip(max=V) - 1
    ids.astype(np.uint16).tofile(folder / "ids.bin")
    np.array([0, 2000]).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": 2000, "bytes": 2000, "documents": 1, "dtype": "uint16"}))
    return Tokens(folder)


@pytest.fixture
def splits(tmp_path):
    return {"train": stream(tmp_path / "train", 0), "validation": stream(tmp_path / "held", 1)}


@pytest.fixture
def oracle(tmp_path):
    save(small(9), tiny_tokenizer(), tmp_path / "oracle")
    return str(tmp_path / "oracle")


def taught(method, splits, folder, lr=1e-2, steps=STEPS, **more):
    student, teacher = (Loaded(small(seed), tiny_tokenizer(), folder / str(seed)) for seed in (0, 7))
    settings = Training(tokens=steps * 4 * CONTEXT, context=CONTEXT, batch=4, lr=lr, **({"save_seconds": 1e9} | more))
    reader = lambda corpus, split, tokenizer: splits[split]  # noqa: E731
    log = teach(student, teacher, splits["train"], method, settings, folder, seed=3, reader=reader)
    return student.model, log


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_distances_are_means_over_all_positions():
    student, one, two = small(0), small(1), small(2)
    rows = [{"input_ids": torch.randint(2, V, (5,)), "labels": torch.zeros(5, dtype=torch.long)} for _ in range(7)]
    student.train()
    got = distances(student, (one, two), rows, 5, 2, V)
    assert student.training
    student.eval()
    for other, value in zip((one, two), got, strict=True):
        total = 0.0
        for row in rows[:5]:
            with torch.no_grad():
                p, q = (m(input_ids=row["input_ids"][None]).logits[0].double().softmax(-1) for m in (other, student))
            total += sum(float(a * (a / b).log()) for at in range(5) for a, b in zip(p[at], q[at], strict=True))
        assert value == pytest.approx(total / 25, rel=1e-5)
    assert distances(student, (one,), rows, 99, 3, V)[0] == pytest.approx(distances(student, (one,), rows, 7, 7, V)[0], rel=1e-6)


@pytest.mark.parametrize(
    "golden, proxy, hacked",
    [
        ([1.7, 1.5, 1.6, 2.0], [1.6, 1.2, 0.8, 0.3], True),
        ([1.7, 1.5, 1.6, 2.0], [1.6, 1.2, 0.8, 1.2], False),  # both rise: the training went wrong, the teacher is not to blame
        ([1.7, 1.5, 1.55, 1.59], [1.6, 1.2, 0.8, 0.3], False),  # less than `rise`
        ([1.7, 1.5, 1.2, 1.0], [1.6, 1.2, 0.8, 0.3], False),
        ([1.0, 1.5, 2.0, 1.9], [1.6, 1.2, 0.8, 0.3], True),
    ],
)
def test_hacking_is_golden_up_and_training_proxy_down(golden, proxy, hacked):
    curves = {"step": [0, 10, 20, 30], "golden": golden, "train_proxy": proxy, "held_proxy": golden}
    said = verdict(curves, 0.1)
    assert (said is not None) == hacked
    if said:
        least = golden.index(min(golden))
        assert f"from step {10 * least} to 30" in said and f"{golden[least]:.3f} to {golden[-1]:.3f}" in said


def test_a_teacher_farther_from_the_oracle_than_the_student_is_named():
    curves = {"golden": [1.0, 0.9]}
    assert outside(curves, 0.9) is None
    assert "1.200 nats per token from the oracle and the student was 1.000" in outside(curves, 1.2)


def test_the_looks_are_where_they_should_be_and_change_nothing(tmp_path, splits, oracle):
    plain, log = taught(ForwardKL(), splits, tmp_path / "plain")
    looked, about = taught(TeacherHacking(oracle=oracle, every=0.34, rows=5), splits, tmp_path / "looked")
    assert same(plain, looked)
    curves = about["curves"]
    assert curves["step"] == [0, 2, 4, 6] and set(curves) == {"step", "train_proxy", "held_proxy", "golden"}
    teacher, judge = small(7), small(9)
    held, train = (Rows(splits[split], CONTEXT, STEPS * 4, 3) for split in ("validation", "train"))
    for at, student in ((0, small(0)), (-1, looked)):
        exact = [*distances(student, (teacher,), train, 5, 4, V), *distances(student, (teacher, judge), held, 5, 4, V)]
        assert [curves[name][at] for name in ("train_proxy", "held_proxy", "golden")] == pytest.approx(exact, rel=1e-6)
    assert about["teacher_golden"] == pytest.approx(distances(teacher, (judge,), held, 5, 4, V)[0], rel=1e-6)
    passes = 2 * multiplied(plain) + 2 * multiplied(teacher) + multiplied(judge)
    assert about["flops"] - log["flops"] == 4 * 5 * CONTEXT * 2 * passes


def test_without_an_oracle_golden_is_the_held_proxy(tmp_path, splits):
    _, about = taught(TeacherHacking(every=0.5, rows=2), splits, tmp_path / "looked")
    assert about["curves"]["golden"] == about["curves"]["held_proxy"] and about["teacher_golden"] == 0.0


def test_few_rows_again_and_again_part_the_curves_and_fresh_ones_do_not(tmp_path, splits):
    how = {"every": 0.25, "rows": 4, "rise": 0.02}
    _, fixed = taught(TeacherHacking(source="fixed", distinct=4, **how), splits, tmp_path / "fixed", steps=60)
    _, fresh = taught(TeacherHacking(source="fresh", **how), splits, tmp_path / "fresh", steps=60)
    gap = {name: log["curves"]["held_proxy"][-1] - log["curves"]["train_proxy"][-1] for name, log in (("fixed", fixed), ("fresh", fresh))}
    assert gap["fixed"] > gap["fresh"]
    assert fixed["curves"]["train_proxy"][-1] < fresh["curves"]["train_proxy"][-1]
    assert fixed["curves"]["golden"][-1] > fresh["curves"]["golden"][-1]


def test_fixed_rows_are_the_first_ones():
    rows = Repeated([{"row": i} for i in range(10)], 3)
    assert len(rows) == 10 and [rows[i]["row"] for i in range(10)] == [0, 1, 2] * 3 + [0]


def test_a_killed_run_neither_loses_nor_repeats_a_look(tmp_path, splits, oracle, monkeypatch):
    method = TeacherHacking(oracle=oracle, every=0.3, rows=3)
    student, whole = taught(method, splits, tmp_path / "whole")
    counted = []
    measure = smelt.distill.teacher_hacking.distances
    monkeypatch.setattr(smelt.distill.teacher_hacking, "distances", lambda *given: counted.append(1) or measure(*given))
    monkeypatch.setattr(smelt._train_loop, "SAVING", 1e9)
    ended = smelt._train_loop._Watch.on_step_end
    for stop in (2, 4):

        def killed(self, args, state, control, stop=stop, **kwargs):
            ended(self, args, state, control, **kwargs)
            if state.global_step == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(smelt._train_loop._Watch, "on_step_end", killed)
            with pytest.raises(KeyboardInterrupt):
                taught(method, splits, tmp_path / "cut", save_seconds=1e-9)
    again, log = taught(method, splits, tmp_path / "cut", save_seconds=1e-9)
    looks = len(whole["curves"]["step"])
    assert len(counted) == 1 + 2 * looks  # step 2 was done three times, and looked at once
    assert same(student, again)
    assert log["curves"] == whole["curves"] and log["warnings"] == whole["warnings"]
    once_more, log = taught(method, splits, tmp_path / "cut", save_seconds=1e-9)
    assert len(counted) == 1 + 2 * looks and same(student, once_more) and log["curves"] == whole["curves"]


def test_what_is_said_and_what_is_refused(tmp_path, splits, monkeypatch):
    monkeypatch.setattr(smelt.distill.teacher_hacking, "verdict", lambda curves, rise: f"hacked by {rise}")
    _, log = taught(TeacherHacking(every=1.0, rows=2, rise=0.5), splits, tmp_path / "said")
    assert "hacked by 0.5" in log["warnings"]
    for settings, message in (
        ({"shard": "fsdp2"}, "shard: fsdp2"),
        ({"teacher": {"model": "base", "cache": "topk(k=4)"}}, "leave out 'cache'"),
    ):
        with pytest.raises(SmeltError, match=message):
            taught(TeacherHacking(), splits, tmp_path / "refused", **settings)
    with pytest.raises(SmeltError, match="it watches a training by an objective"):
        TeacherHacking(objective=GKD())
    with pytest.raises(SmeltError, match="tokenizers differ"):
        taught(TeacherHacking(oracle="embedded"), splits, tmp_path / "other")
    assert registry.text(TeacherHacking(source="fixed")) == "teacher_hacking(source='fixed')"
