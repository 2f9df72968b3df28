"""GGUF files: transformers loads the same function and the same tokenizer from them; what GGUF cannot say is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import smelt.export as export_module
from smelt.compress import compress, save_compressed
from smelt.export import BLOCK, LLAMA3, Exported, export
from smelt.model._load import load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights.rtn import RTN

gguf = pytest.importorskip("gguf")

IDS = torch.arange(2, 42).view(2, 20)
HARD = [
    "def f(x):\n\treturn x ** 2  # don't\r\n\n\n",
    "naïve 数学 🙂‍↔️ \u00a0\u200b e\u0301 ÅÅ",
    "  leading,   inner   and trailing   ",
    "12345.678e-9 0x1F <|endoftext|> <|pad|>< |pad|> <|endoftext|>x",
    "",
    "\x00\x7f \ud7ff",
]


@pytest.fixture
def made(tmp_path):
    """A checkpoint of the tiny architecture, and where its GGUF goes."""

    def make(architecture="llama", tokenizer=None, **sizes):
        model = tiny(architecture, **sizes)
        with torch.no_grad():  # norms and biases that are not what a fresh model has
            for name, p in model.named_parameters():
                if p.dim() == 1:
                    p.add_(torch.rand(p.shape, generator=torch.Generator().manual_seed(len(name))) - 0.5)
        save(model, tokenizer or tiny_tokenizer(), tmp_path / "model")
        return model, tmp_path / "model", tmp_path / "out" / "model.gguf"

    (tmp_path / "out").mkdir()
    return make


def back(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture, sizes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-5}),
        ("llama", {"head_dim": 32, "heads": 4, "kv_heads": 1}),
        ("llama", {"kv_heads": 4}),
        ("mistral", {"kv_heads": 1}),
        ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_transformers_loads_the_same_function(architecture, sizes, made):
    model, folder, file = made(architecture, **sizes)
    done = export(folder, file, "f32")
    again = back(file)
    assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-6 * model(IDS).logits.abs().max().item())
    assert done.bytes == file.stat().st_size and done.parameters == model.num_parameters()
    assert not done.notes or (architecture.startswith("qwen") and "NFC" in done.notes[0])  # AutoTokenizer makes it a Qwen2Tokenizer
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert again.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert torch.equal(
        again.generate(IDS[:, :4], max_new_tokens=4, do_sample=False), model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False)
    )


def test_rows_of_a_head_lie_as_neighbours():
    order = export_module._neighbours(2, 6).tolist()
    assert order == [head * 6 + half * 3 + at for head in range(2) for at in range(3) for half in range(2)]


def nearest_block(row):
    """Q8_0 of one row, block by block: scale max|w| / 127 rounded to float16 only where it is stored."""
    out = []
    for at in range(0, len(row), 32):
        block = row[at : at + 32].astype(np.float32)
        step = np.abs(block).max() / np.float32(127)
        code = np.zeros_like(block) if step == 0 else np.sign(block) * np.floor(np.abs(block * (np.float32(1) / step)) + np.float32(0.5))
        out.append(code * np.float32(np.float16(step)))
    return np.concatenate(out)


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0"])
def test_every_weight_is_rounded_once(dtype, made):
    model, folder, file = made("llama", ffn=96)
    done = export(folder, file, dtype)
    again, matrices = dict(back(file).named_parameters()), 0
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.equal(again[name], p), name
            continue
        matrices += 1
        if dtype == "q8_0":
            want = torch.from_numpy(np.stack([nearest_block(row) for row in p.numpy()]))
            step = p.unflatten(1, (-1, BLOCK)).abs().amax(2, keepdim=True) / 127
            assert ((again[name] - p).unflatten(1, (-1, BLOCK)).abs() <= step * (0.5 + 127 * 2**-11) + 1e-7).all(), name
        else:
            want = p.to({"f16": torch.float16, "bf16": torch.bfloat16}[dtype]).float()
        assert torch.equal(again[name], want), name
    assert done.types == {dtype.upper(): matrices, "F32": sum(p.dim() == 1 for p in model.parameters())}


def test_columns_that_are_no_multiple_of_32_stay_f16(made):
    model, folder, file = made("llama", ffn=88)
    done = export(folder, file, "q8_0")
    assert done.types["F16"] == model.config.num_hidden_layers and "2 matrices are f16" in done.notes[0]
    again = dict(back(file).named_parameters())["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(again, model.model.layers[0].mlp.down_proj.weight.half().float())


@torch.no_grad()
@pytest.mark.parametrize("bits, group", [(4, 32), (8, 32), (4, 0), (8, 96)])
def test_codes_are_kept(bits, group, tmp_path):
    """Equal to compressed-tensors' own decoding, once what GGUF multiplies in float32 is rounded to the float16 of the scales."""
    original = tiny("llama", hidden=96, ffn=192, heads=3, kv_heads=1)
    model, report = compress(original, None, RTN(bits=bits, group=group, symmetric=True), [], progress=None)
    folder, file = tmp_path / "packed", tmp_path / "packed.gguf"
    save_compressed(model, tiny_tokenizer(), folder, report)
    done = export(folder, file)
    assert done.types[f"Q{bits}_0"] == 14 and done.types["F16"] == 1
    plain, again = load(folder).model, dict(back(file).named_parameters())
    for name, p in plain.named_parameters():
        assert torch.equal(again[name].half().float() if p.dim() == 2 else again[name], p.half().float() if p.dim() == 2 else p), name
    assert_close(back(file)(IDS).logits, plain(IDS).logits, rtol=0, atol=0.02 * plain(IDS).logits.abs().max().item())


@pytest.mark.parametrize("method", [RTN(bits=4, group=32), RTN(bits=3, group=32, symmetric=True), RTN(bits=4, group=16, symmetric=True)])
def test_codes_without_a_type_are_refused(method, tmp_path):
    model, report = compress(tiny("llama", layers=1), None, method, [], progress=None)
    save_compressed(model, tiny_tokenizer(), tmp_path / "packed", report)
    with pytest.raises(SmeltError, match="only 4 or 8 bit codes"):
        export(tmp_path / "packed", tmp_path / "packed.gguf")
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


# tokenizers


def same_ids(tokenizer, file):
    again = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in HARD:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"], repr(text)
        ids = tokenizer(text)["input_ids"]
        assert again.decode(ids) == tokenizer.decode(ids)
    assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (
        tokenizer.bos_token_id,
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )
    return again


def test_the_tokenizer_comes_along(made):
    _, folder, file = made("llama", vocab=400)  # more rows than tokens
    export(folder, file)
    same_ids(tiny_tokenizer(), file)


def split_by(regex, normal=None, ignore_merges=False):
    tokenizer = tiny_tokenizer(321)  # another size: the cached one of the other tests is left alone
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(regex), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.normalizer = normal
    backend.model.ignore_merges = ignore_merges
    return tokenizer


@pytest.mark.parametrize("regex, ignore, name", [(LLAMA3.replace("{1,3}", ""), False, "qwen2"), (LLAMA3, True, "llama-bpe")])
def test_other_splits_go_by_their_names(regex, ignore, name, made):
    tokenizer = split_by(regex, ignore_merges=ignore)
    _, folder, file = made("llama", tokenizer=tokenizer, vocab=330)
    export(folder, file)
    again = same_ids(tokenizer, file)
    assert json.loads(again.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == regex, name


def test_a_normalizer_is_noted_and_an_unknown_split_refused(made):
    _, folder, file = made("llama", tokenizer=split_by(LLAMA3.replace("{1,3}", ""), normalizers.NFC()), vocab=330)
    assert "NFC" in export(folder, file).notes[0]
    for regex, ignore in ((r"\w+|\s+", False), (LLAMA3, False)):
        save(tiny("llama", vocab=330), split_by(regex, ignore_merges=ignore), folder)
        with pytest.raises(SmeltError, match="cuts text otherwise than gpt-2, llama-bpe, qwen2"):
            export(folder, file)


def test_the_embedded_model(tmp_path):
    done = export("embedded", tmp_path / "embedded.gguf", "bf16")
    loaded = load("embedded")
    ids = loaded.tokenizer("import os\n\n\ndef walk(top):\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        ours, theirs = loaded.model(ids).logits, back(done.path)(ids).logits
    assert_close(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item())  # its weights are bfloat16 already
    same_ids(loaded.tokenizer, done.path)


# refusals


@pytest.mark.parametrize(
    "architecture, sizes, why",
    [
        ("gemma2", {}, "does not write 'gemma2' models"),
        ("mistral", {"sliding_window": 8}, "sliding windows"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding windows"),
        ("llama", {"attention_bias": True}, "biases"),
        ("llama", {"hidden_act": "gelu"}, "its activation is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary embedding is 'linear'"),
    ],
)
def test_what_gguf_cannot_say_is_refused(architecture, sizes, why, made):
    _, folder, file = made(architecture, **sizes)
    with pytest.raises(SmeltError, match=why):
        export(folder, file)
    assert not list(file.parent.iterdir())


def test_what_transformers_supposes_is_noted(made):
    _, folder, file = made("qwen3", head_dim=32)
    assert "supposes head_dim=128" in export(folder, file).notes[0]


def test_wrong_places_and_types(made, monkeypatch):
    model, folder, file = made()
    with pytest.raises(SmeltError, match="did you mean 'q8_0'"):
        export(folder, file, "q8")
    for wrong in (file.with_suffix(".bin"), file.parent / "no" / "x.gguf"):
        with pytest.raises(SmeltError, match=r"ends in \.gguf"):
            export(folder, wrong)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    save(model, tiny_tokenizer(), folder)
    file.write_text("what was there before")
    with pytest.raises(SmeltError, match=r"up_proj\.weight' has values that F16 cannot hold"):
        export(folder, file)
    assert file.read_text() == "what was there before" and len(list(file.parent.iterdir())) == 1
    assert isinstance(export(folder, file, "bf16"), Exported)
    monkeypatch.setattr(export_module, "gguf", None)
    with pytest.raises(SmeltError, match="pip install"):
        export(folder, file)


def test_a_full_disk_leaves_nothing(made, monkeypatch):
    _, folder, file = made()
    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SmeltError, match="No space left"):
        export(folder, file)
    assert not list(file.parent.iterdir())
