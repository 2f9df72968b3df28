"""The preflight: refusals before any weight is read, and estimates of the right size."""

from __future__ import annotations

import pytest

from smelt.model._files import header
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.preflight import check, parameters, plan
from smelt.recipe import read
from smelt.spec import SmeltError


@pytest.fixture
def folder(tmp_path):
    save(tiny("llama"), tiny_tokenizer(), tmp_path / "tiny")
    return tmp_path


def recipe(folder, stages: str, **more: str):
    return read("r.yaml", more, text=f"name: r\nmodel: {folder / 'tiny'}\nstages:\n{stages}")


def test_it_reads_headers_only(folder, monkeypatch):
    import safetensors

    monkeypatch.setattr(safetensors, "safe_open", None)
    plans = plan(recipe(folder, "  - weights: minitron(layers=1)\n"), {})
    assert plans[0].parameters == sum(a * b for _, (a, b) in two(header(folder / "tiny")))
    assert plans[1].parameters < plans[0].parameters


def two(tensors):
    return [(dtype, (shape[0], shape[1] if len(shape) > 1 else 1)) for dtype, shape in tensors.values()]


def test_parameters_are_counted_without_memory():
    model = tiny("qwen3")
    assert parameters(model.config) == model.num_parameters()


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ("  - distill: forward_kl()\n    train: {tokens: 100, context: 32}\n", "add 'teacher: base'"),
        ("  - train: {tokens: 100, context: 4096}\n", "longer than the model's 256"),
        ("  - weights: rtn(bits=4, group=32)\n  - train: {tokens: 100, context: 32}\n", "quantize last"),
        ("  - weights: rtn(bits=4, group=48)\n", "group=48 does not divide"),
        ("  - weights: awq(quantizer=rtn(bits=4, group=48))\n", "group=48 does not divide"),
        ("  - weights: minitron(layers=9)\n", "minitron"),
        ("  - train: {tokens: 100, context: 32, data: 'nowhere/*.txt'}\n", "nowhere"),
        ("  - cache: sink_window()\n  - decode: prompt_lookup()\n", "sink_window"),
        ("  - rank: self_calibrated()\n", "self_calibrated has parameters that have to be trained"),
        ("  - rank: tournament(judge=self_calibrated())\n", "self_calibrated has parameters that have to be trained"),
        ("  - attention: lolcats()\n    train: {tokens: 100, context: 4096}\n", "longer than the model's 256"),
        ("  - attention: based()\n    train: {tokens: 100, context: 32}\n", "an attention stage takes no 'train:' block"),
    ],
)
def test_what_cannot_work_is_refused_with_its_line(folder, stages, said):
    with pytest.raises(SmeltError) as caught:
        check(recipe(folder, stages), folder / "runs", {})
    assert said in str(caught.value) and str(caught.value).startswith("r.yaml:"), caught.value


def test_a_judge_that_was_trained_before_is_read(folder):
    train = "    train: {data: code_pairs, tokens: 1000, context: 64}\n"
    assert len(plan(recipe(folder, f"  - rank: self_calibrated()\n{train}  - rank: tournament(judge=self_calibrated())\n"), {})) == 3
    (folder / "tiny" / "judge.safetensors").touch()
    assert len(plan(recipe(folder, "  - rank: self_calibrated()\n"), {})) == 2


def test_the_teacher_of_a_judge_may_be_another_variant(folder):
    stage = "  - rank: margin_mse(labels=pointwise())\n    train: {teacher: %s, data: code_pairs, tokens: 1000, context: 64}\n"
    assert len(plan(recipe(folder, stage % "base"), {})) == 2
    with pytest.raises(SmeltError, match="no such folder"):
        plan(recipe(folder, stage % "bose"), {})


def test_a_recipe_that_only_binds_says_so(folder):
    assert check(recipe(folder, "  - cache: kivi(group=16)\n"), folder / "runs", {})[-2].endswith(", no new checkpoint")


def test_a_teacher_with_another_tokenizer_of_the_same_size_is_refused(folder):
    other = byte_level_bpe(["zebra quilt jumps over lazy vowels " * 9, "éàü"], 320, 256)
    assert len(other) == len(byte_level_bpe(["zebra quilt jumps over lazy vowels " * 9, "éàü"], 320, 256))
    save(tiny("llama", seed=1), other, folder / "other")
    stages = f"  - distill: forward_kl()\n    train: {{tokens: 100, context: 32, teacher: {folder / 'other'}}}\n"
    with pytest.raises(SmeltError, match="another tokenizer"):
        check(recipe(folder, stages), folder / "runs", {})


def test_estimates(folder):
    stages = "  - distill: forward_kl()\n    train: {teacher: base, tokens: 1_000_000, context: 64, batch: 4}\n"
    made = plan(recipe(folder, stages), {})[1]
    n = made.parameters
    assert 8 * n * 1_000_000 <= made.flops <= 16 * n * 1_000_000  # 6 N student, 2 N teacher, attention on top
    assert made.memory >= 20 * n and made.disk == 4 * n
    lines = check(recipe(folder, stages), folder / "runs", {})
    assert lines[-1].startswith("ok") and any("peak memory" in line for line in lines)


@pytest.mark.parametrize(("full", "warned"), [(3e9, True), (1.1e9, False)])
def test_a_training_in_bf16_is_estimated_in_bf16_and_fp32_named_where_it_is_faster(folder, monkeypatch, full, warned):
    monkeypatch.setattr("smelt.preflight.speed", lambda half=False: 1e9 if half else full)
    plain = "  - train: {tokens: 1_000_000, context: 64, batch: 4%s}\n"
    half = check(recipe(folder, plain % ", precision: bf16"), folder / "runs", {})
    assert any("1 GFLOP/s in bf16 as measured now" in line for line in half)
    assert [line for line in half if line.startswith("warning")] == (
        ["warning: products of fp32 are 3.0 times as fast here; --set train.precision=fp32 trains faster"] if warned else []
    )
    both = check(recipe(folder, plain % "" + plain % ", precision: bf16"), folder / "runs", {})
    assert any(f"{full / 1e9:.0f} GFLOP/s in fp32 and 1 GFLOP/s in bf16" in line for line in both)
    assert [line for line in check(recipe(folder, plain % ""), folder / "runs", {}) if "bf16" in line or "warning" in line] == []
