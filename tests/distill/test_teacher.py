from __future__ import annotations

import pytest
import torch

from smelt.distill._teacher import agree, named, supply
from smelt.distill._topk import TopK, fill
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.spec import SmeltError


@pytest.fixture
def inputs():
    ids = torch.randint(320, (2, 9))
    return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(9).repeat(2, 1) % 5, "row": torch.arange(2)}


def test_the_teacher_sees_the_same_ids_and_positions_in_eval_mode_without_gradient(inputs):
    model = tiny("qwen2", attention_dropout=0.5)
    expected = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], output_hidden_states=True, use_cache=False)
    model.train()
    have = supply(model, ("student", "teacher", "teacher_hidden"))(inputs)
    assert set(have) == {"teacher", "teacher_hidden"}
    torch.testing.assert_close(have["teacher"], expected.logits, rtol=0, atol=1e-5)
    assert not have["teacher"].requires_grad
    assert len(have["teacher_hidden"]) == model.config.num_hidden_layers + 1
    for got, hidden in zip(have["teacher_hidden"], expected.hidden_states, strict=True):
        torch.testing.assert_close(got, hidden, rtol=0, atol=1e-5)
    plain = supply(model, ("teacher",))({"input_ids": inputs["input_ids"]})
    assert set(plain) == {"teacher"}
    assert not torch.allclose(plain["teacher"], have["teacher"])  # other positions


def test_wider_logits_are_cut(inputs, model):
    assert supply(model, ("teacher",), width=300)(inputs)["teacher"].shape == (2, 9, 300)


def test_bf16_is_near_and_not_equal(inputs, model):
    whole, half = (supply(model, ("teacher",), precision=precision)(inputs)["teacher"] for precision in ("fp32", "bf16"))
    assert half.dtype == torch.bfloat16
    assert 0 < (whole - half).abs().max() < 0.1 * whole.abs().max()


def test_a_cache_has_no_hidden_states(tmp_path, inputs, model):
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(2)]
    cached = fill(TopK(4), supply(model, ("teacher",)), rows, tmp_path / "cache", vocab=320)
    assert torch.equal(supply(model, ("teacher",), cached)(inputs)["teacher"], cached(inputs))
    with pytest.raises(SmeltError, match="keeps logits only"):
        supply(model, ("teacher", "teacher_hidden"), cached)


def test_who_can_teach_whom(tmp_path):
    tokenizer = tiny_tokenizer()
    student = Loaded(tiny(layers=1), tokenizer, tmp_path)
    reading = ("student", "teacher")
    assert agree(student, Loaded(tiny(), tokenizer, tmp_path), reading) == 320
    assert agree(student, Loaded(tiny(vocab=384), tokenizer, tmp_path), reading) == 320  # padded logits are cut
    assert agree(student, None, ("student", "labels")) == 320
    with pytest.raises(SmeltError, match="reads a teacher and there is none"):
        agree(student, None, reading)
    with pytest.raises(SmeltError, match="one and the same"):
        agree(student, student, reading)
    with pytest.raises(SmeltError, match="teacher has 310 logits and the student 320"):
        agree(student, Loaded(tiny(vocab=310), tokenizer, tmp_path), reading)


def test_another_tokenizer_of_the_same_size_is_refused(tmp_path):
    other = byte_level_bpe(["zebra zebras quick quickly zigzag " * 3] * 4, len(tiny_tokenizer()), 256)
    while len(other) < len(tiny_tokenizer()):
        other.add_tokens([f"<{len(other)}>"])
    assert len(other) == len(tiny_tokenizer())
    student, teacher = Loaded(tiny(), tiny_tokenizer(), tmp_path / "s"), Loaded(tiny(), other, tmp_path / "t")
    assert student.model.config.vocab_size == teacher.model.config.vocab_size
    for reading in (("student", "teacher"), ("student_hidden", "teacher_hidden")):
        with pytest.raises(SmeltError, match="tokenizers differ"):
            agree(student, teacher, reading)
    agree(student, teacher, ("student", "labels"))  # nobody asks the teacher


def test_what_a_train_block_may_say():
    assert named(None) == ((), None)
    assert named("embedded") == (("embedded",), None)
    assert named({"model": "a/b"}) == (("a/b",), None)
    assert named({"model": "base", "cache": "topk(k=8)"}) == (("base",), TopK(8))
    assert named({"model": "base", "cache": TopK(8)}) == (("base",), TopK(8))
    assert named(["a", "base"]) == (("a", "base"), None)
    assert named({"model": "a", "endpoint": "http://x"}) == ((), None)  # asked for text, see `Course.ask`
    for wrong in (
        {"cache": "topk()"},
        {"model": "a", "cahce": "topk()"},
        {"model": "a", "endpoint": 3},
        {"model": ["a", "b"], "cache": "topk()"},
        3,
        {"model": "a", "cache": 5},
    ):
        with pytest.raises(SmeltError):
            named(wrong)
