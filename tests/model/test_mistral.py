"""Mistral: the formula of its parameters, its initial weights, and a tokenizer that loses nothing."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.data import Document
from smelt.model._load import load, same_tokenizer, save
from smelt.model._tiny import tiny_tokenizer
from smelt.model.mistral import END, PAD, Mistral, byte_level_bpe
from smelt.spec import SmeltError


@dataclass(frozen=True)
class Lines:
    def documents(self, split):
        for i in range(40 if split == "train" else 0):
            yield Document(str(i), f"def function_{i}(value):\n    return value + {i}\n")


SMALL = dict(layers=2, hidden=64, ffn=48, heads=2, kv_heads=1, vocab=300, context=32, data=Lines())  # noqa: C408


@pytest.mark.parametrize("more", [{}, {"layers": 3, "ffn": 80}, {"heads": 4, "kv_heads": 2, "hidden": 128}, {"heads": 3, "kv_heads": 3}])
def test_parameters_follow_the_formula(more):
    method = Mistral(**(SMALL | more))
    model, tokenizer = method.create(0)
    d, f, h, g, n, v = method.hidden, method.ffn, method.heads, method.kv_heads, method.layers, method.vocab
    assert sum(p.numel() for p in model.parameters()) == v * d + n * (2 * d * (h + g) * 64 + 3 * d * f + 2 * d) + d
    assert model.config.max_position_embeddings == method.context == tokenizer.model_max_length
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_writers_to_the_residual_stream_start_smaller():
    layers = 4
    model, _ = Mistral(**(SMALL | {"layers": layers, "hidden": 256, "ffn": 512})).create(0)
    for layer in model.model.layers:
        for module, spread in (
            (layer.self_attn.q_proj, 0.02),
            (layer.mlp.up_proj, 0.02),
            (layer.self_attn.o_proj, 0.02 / (2 * layers) ** 0.5),
            (layer.mlp.down_proj, 0.02 / (2 * layers) ** 0.5),
        ):
            n = module.weight.numel()
            assert abs(module.weight.std().item() / spread - 1) < 5 / (2 * n) ** 0.5


def test_it_survives_saving(tmp_path):
    model, tokenizer = Mistral(**SMALL).create(0)
    save(model, tokenizer, tmp_path)
    again = load(tmp_path)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert same_tokenizer(again.tokenizer, tokenizer)


def test_it_needs_a_corpus_and_heads_that_divide():
    with pytest.raises(SmeltError, match="needs a corpus"):
        Mistral().create(0)
    with pytest.raises(SmeltError, match="heads=3 is not a multiple of kv_heads=2"):
        Mistral(**(SMALL | {"heads": 3, "kv_heads": 2})).create(0)


@given(st.text(max_size=200))
@settings(max_examples=500, deadline=None)
def test_the_tokenizer_loses_no_text(text):
    tokenizer = tiny_tokenizer()
    text = text.replace(END, "").replace(PAD, "")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert all(2 <= i < len(tokenizer) for i in ids)


def test_the_tokenizer_repeats_and_keeps_to_its_size():
    texts = [f"some words and numbers {i * i}\n" for i in range(300)]
    a, b = (byte_level_bpe(texts, 400, 64) for _ in range(2))
    assert same_tokenizer(a, b) and len(a) == 400
    assert sorted(a.get_vocab().values()) == list(range(400))
    assert (a.eos_token, a.pad_token, a.eos_token_id, a.pad_token_id) == (END, PAD, 0, 1)
