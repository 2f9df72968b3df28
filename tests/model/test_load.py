"""load and save: exact round trips, and a refusal in one line for whatever would load wrong or run code."""

from __future__ import annotations

import json
import pickle
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from smelt.model._files import header
from smelt.model._load import _cast, load, locate, same_tokenizer, save, vocabulary
from smelt.model._tiny import ARCHITECTURES, tiny, tiny_tokenizer
from smelt.model.mistral import byte_level_bpe
from smelt.spec import SmeltError

IDS = torch.arange(2, 34).reshape(2, 16)
MANY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def outputs(model):
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


def edit(folder, file="config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(folder, change):
    """The weights after change(weights)."""
    weights = load_file(folder / "model.safetensors")
    weights = change(weights) or weights
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder, said=None, **options):
    with pytest.raises(SmeltError, match=said) as error:
        load(folder, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 1000
    str(error.value).encode()
    return error.value


@pytest.fixture
def folder(tmp_path):
    save(tiny("llama"), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


# round trips

PLAIN = """
import sys, torch
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.arange(2, 34).reshape(2, 16)
found = {}
for name in sys.argv[2:]:
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    with torch.no_grad():
        out = auto.from_pretrained(f"{sys.argv[1]}/{name}", dtype=torch.float32).eval()(input_ids=ids)
    found[name] = out.logits if "logits" in out else out.last_hidden_state
assert not [m for m in sys.modules if m.startswith("smelt")]
torch.save(found, f"{sys.argv[1]}/found.pt")
"""


def test_every_architecture_comes_back_exactly_also_without_smelt(tmp_path):
    expected = {}
    for name in ARCHITECTURES:
        model = tiny(name)
        save(model, tiny_tokenizer(), tmp_path / name)
        again = load(tmp_path / name)
        expected[name] = outputs(model)
        assert torch.equal(outputs(again.model), expected[name]), name
        assert not again.model.training and again.folder == tmp_path / name
        save(again.model, again.tokenizer, tmp_path / "again" / name)
        # not compared with tiny_tokenizer(): transformers reads any tokenizer of a Qwen2 model as Qwen2Tokenizer
        assert same_tokenizer(load(tmp_path / "again" / name).tokenizer, again.tokenizer)
    subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path), *ARCHITECTURES], check=True)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for name in ARCHITECTURES:
        assert torch.equal(found[name], expected[name]), name


def test_shards_come_back_exactly(tmp_path):
    model = tiny("llama")
    save(model, tiny_tokenizer(), tmp_path)
    whole = header(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert header(tmp_path) == whole
    assert torch.equal(outputs(load(tmp_path).model), outputs(model))


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_saving_in_half_precision_leaves_the_model_as_it_was(tmp_path, architecture):
    model = tiny(architecture)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save(model, tiny_tokenizer(), tmp_path, dtype=torch.bfloat16)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float32 and model.config.dtype == "float32"
    assert {kind for kind, _ in header(tmp_path).values()} == {"BF16"}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    again = load(tmp_path).model
    assert again.dtype == torch.float32
    for name, value in again.state_dict().items():
        assert torch.equal(value, before[name].bfloat16().float())
    assert load(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_tied_weights_are_stored_once_in_any_precision(tmp_path):
    model = tiny("llama")
    cast = _cast(model.state_dict(), torch.bfloat16)
    assert cast["lm_head.weight"] is cast["model.embed_tokens.weight"]
    save(model, tiny_tokenizer(), tmp_path, dtype=torch.bfloat16)
    assert "lm_head.weight" not in header(tmp_path)


# where models are looked for


def test_names_that_are_no_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, said in [
        ("nothing", "no such folder"),
        ("./nothing/here", "no such folder"),
        ("smelt-nobody/no-such-model", "not on this machine"),
        ("a b/c d", "not on this machine"),
        ("x" * 5000, "no such folder"),
        ("x/" + "y" * 5000, "not on this machine"),
        ("a\0b", "no such folder"),
        ("a\nb\udc00", "no such folder"),
        ("", "no config.json"),
    ]:
        refused(name, said)


def test_what_is_missing_is_named(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    refused(folder, "no model.safetensors")
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_a_model_without_tokenizer_is_refused(folder):
    (folder / "tokenizer.json").unlink()
    refused(folder, "there is no tokenizer")


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(folder):
    large = byte_level_bpe([" ".join(f"word{i}" for i in range(200))] * 3, 400, 256)
    assert max(large.get_vocab().values()) >= 320
    large.save_pretrained(folder)
    refused(folder, r"tokenizer has ids up to \d+, its embedding only 320 rows")


# code


@pytest.fixture
def bomb(tmp_path):
    """Code that leaves a trace when it runs, and the place of the trace."""
    trace = tmp_path / "ran"
    return f"open({str(trace)!r}, 'w').close()\n", trace


class Payload:
    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return exec, (self.code,)


def test_pickled_weights_are_refused_unless_trusted(folder):
    model = tiny("llama")
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    refused(folder, "--trust-pickle")
    assert torch.equal(outputs(load(folder, trust_pickle=True).model), outputs(model))


def test_pickled_code_is_never_run(folder, bomb):
    code, trace = bomb
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Payload(code)}, folder / "pytorch_model.bin")
    refused(folder, "--trust-pickle")
    refused(folder, "cannot be loaded", trust_pickle=True)  # read with weights_only
    assert not trace.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # so the test can fail


def test_pickles_beside_safetensors_are_not_read(folder, bomb):
    code, trace = bomb
    for name in ("pytorch_model.bin", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(Payload(code)))
    load(folder)
    load(folder, trust_pickle=True)
    assert not trace.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_its_own_is_refused_unless_trusted(folder, bomb, file):
    code, trace = bomb
    (folder / "evil.py").write_text(code + "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n")
    names = {"AutoConfig": "evil.LlamaConfig", "AutoModelForCausalLM": "evil.LlamaForCausalLM"}
    edit(folder, file, auto_map=names if file == "config.json" else {"AutoTokenizer": [None, "evil.PreTrainedTokenizerFast"]})
    refused(folder, f"its own code .auto_map in {file}.*--trust-remote-code")
    assert not trace.exists()


def test_kernels_of_its_own_are_refused(folder):
    for key in ("attn_implementation", "_attn_implementation"):
        edit(folder, **{key: "evil/kernel"})
        refused(folder, "--trust-remote-code")
        edit(folder, **{key: None})


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "evil/model"}))
    refused(folder, "merge the adapter first")


# damaged and hostile files


def test_a_missing_shard_and_paths_out_of_the_folder_are_refused(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    for shard in (
        "gone.safetensors",
        "../secret.safetensors",
        str(tmp_path / "secret.safetensors"),
        "..",
        "",
        "x" * 5000,
        "a\0b",
        "\ud800",
        "a\nb",
    ):
        index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, "named in the index is not there")
    for index in ({}, {"weight_map": []}, {"weight_map": {"a": 3}}, [], 3):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(folder, r"weight_map|a JSON object is expected")
    for text in ("", "{", "[" * 100_000, "\xff"):
        (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
        refused(folder, "not readable as JSON")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"intermediate_size": 97}, r"'model.layers.0.mlp.gate_proj.weight' is \[96, 64\] in the file, but \[97, 64\]"),
        ({"vocab_size": 300}, r"is \[320, 64\] in the file, but \[300, 64\]"),
        ({"num_key_value_heads": 4}, "k_proj"),
        ({"num_hidden_layers": 3}, "9 missing weights"),
        ({"num_hidden_layers": 1}, "9 unexpected weights"),
        ({"tie_word_embeddings": False}, "1 missing weights, 'lm_head.weight'"),
        ({"attention_bias": True}, "missing weights, .*bias"),
        ({"num_hidden_layers": 10**9}, "there are only 20 weights"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"vocab_size": 10**12}, r"but \[1000000000000, 64\]"),
        ({"head_dim": 10**9}, "q_proj"),
        ({"model_type": "evil"}, "cannot be loaded"),
        ({"hidden_act": "exec"}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "compresed-tensors"}}, "did you mean 'compressed-tensors'"),
        ({"quantization_config": 3}, "not known"),
    ],
)
def test_a_configuration_that_does_not_belong_to_the_weights_is_refused(folder, changes, said):
    edit(folder, **changes)
    refused(folder, said)


def test_no_value_in_the_configuration_hangs_or_takes_much_memory(folder):
    """Each field in turn holds something hostile: one line or a model, within seconds and little memory."""
    good = json.loads((folder / "config.json").read_text())
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    for key in good:
        for value in (10**10, "x", -1):
            edit(folder, **(good | {key: value}))
            try:
                load(folder)
            except SmeltError as error:
                assert "\n" not in str(error)
    assert time.monotonic() - began < 120
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_a_missing_weight_of_absurd_size_is_not_made_up(folder):
    """transformers would fill it in: 64 billion random numbers."""
    rewrite(folder, lambda w: {k: v for k, v in w.items() if "embed_tokens" not in k})
    edit(folder, vocab_size=10**9)
    refused(folder, r"describes 6.4e\+10 parameters")


def test_weights_that_are_not_finite_are_refused(folder):
    for value in (float("nan"), float("inf")):

        def plant(weights, value=value):
            weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value

        rewrite(folder, plant)
        refused(folder, r"'model.layers.1.mlp.up_proj.weight' has values that are not finite")


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn])
def test_codes_without_a_description_are_refused(folder, kind):
    rewrite(folder, lambda w: {k: (v * 30).to(kind) if k.endswith("proj.weight") else v for k, v in w.items()})
    refused(folder, "holds codes .*no quantization_config")


def quantize(folder):
    """int8 codes with a scale per row, in the format compressed-tensors reads."""

    def codes(weights):
        out = {}
        for name, value in weights.items():
            if not name.endswith("proj.weight"):
                out[name] = value
                continue
            scale = value.abs().amax(1, keepdim=True) / 127
            out[name + "_packed"] = pack_to_int32((value / scale).round().to(torch.int8), 8)
            out[name + "_scale"], out[name + "_shape"] = scale, torch.tensor(value.shape)
        return out

    rewrite(folder, codes)
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}}
    edit(
        folder,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": ["lm_head"],
        },
    )


def test_quantized_codes_load_with_their_scales_only(folder):
    exact = outputs(tiny("llama"))
    quantize(folder)
    again = outputs(load(folder).model)
    assert 0 < (again - exact).abs().max() < 0.05 * exact.abs().max()
    rewrite(folder, lambda w: {k: v for k, v in w.items() if k != "model.layers.1.mlp.up_proj.weight_scale"})
    refused(folder, "1 missing weights, 'model.layers.1.mlp.up_proj.weight_scale'")


def attempt(folder):
    """A refusal in one line, or a model that computes; nothing else."""
    try:
        loaded = load(folder)
    except SmeltError as error:
        assert "\n" not in str(error)
        str(error).encode()
        return False
    assert outputs(loaded.model).shape == (2, 16, 320)
    return True


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    save(tiny("llama"), tiny_tokenizer(), folder)
    return folder, (folder / "model.safetensors").read_bytes()


@given(st.data())
@settings(max_examples=300, **MANY)
def test_cut_files_are_refused(original, data):
    folder, whole = original
    keep = data.draw(st.integers(0, len(whole) - 1) | st.integers(0, 3000))
    (folder / "model.safetensors").write_bytes(whole[:keep])
    with pytest.raises(SmeltError):
        locate(str(folder))


@given(st.data())
@settings(max_examples=150, **MANY)
def test_flipped_header_bytes_are_refused_or_harmless(original, data):
    folder, whole = original
    length = struct.unpack("<Q", whole[:8])[0]
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 7 + length))
        changed[at] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(changed)
    attempt(folder)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
@settings(max_examples=300, **MANY)
def test_hostile_headers_are_refused_or_harmless(original, data):
    """A well-formed JSON table in which one thing is something else."""
    folder, whole = original
    length = struct.unpack("<Q", whole[:8])[0]
    table = json.loads(whole[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(table)))
    key = data.draw(st.sampled_from(["", "dtype", "shape", "data_offsets"]))
    value = data.draw(VALUES | st.lists(st.integers(0, 2**40), max_size=3))
    if key and isinstance(table[name], dict):
        table[name][key] = value
    else:
        table[name] = value
    raw = json.dumps(table).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + whole[8 + length :])
    try:
        locate(str(folder))
    except SmeltError as error:
        assert "\n" not in str(error)
    else:
        attempt(folder)


F32 = {"dtype": "F32", "shape": [2]}


@pytest.mark.parametrize(
    "table",
    [
        {"a": F32 | {"data_offsets": [0, 8]}, "b": F32 | {"data_offsets": [0, 8]}},  # the same bytes twice
        {"a": F32 | {"data_offsets": [4, 12]}},  # a gap
        {"a": F32 | {"data_offsets": [0, 16]}},
        {"a": F32 | {"data_offsets": [8, 0]}},
        {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F16", "shape": [2], "data_offsets": [0, 8]}},
        {"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}},
        {"a": 3},
        [],
    ],
)
def test_headers_that_lie_are_refused_by_our_own_check(tmp_path, table):
    raw = json.dumps(table).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(SmeltError, match=r"header is malformed|cut short"):
        header(tmp_path)


@given(st.binary(max_size=200), st.integers(0, 2**64 - 1))
@settings(max_examples=200, **MANY)
def test_noise_is_refused(original, noise, length):
    folder, _ = original
    for data in (noise, struct.pack("<Q", length) + noise, struct.pack("<Q", len(noise)) + noise):
        (folder / "model.safetensors").write_bytes(data)
        with pytest.raises(SmeltError):
            locate(str(folder))


def test_a_header_that_is_deep_or_larger_than_any_real_one_is_refused_at_once(folder):
    began = time.monotonic()
    for raw in (b"[" * 1_000_000, b'{"a":' * 1_000_000):
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
        refused(folder, "malformed")
    with open(folder / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", 90_000_000))
        out.truncate(100_000_000)  # a hole
    refused(folder, "not a safetensors file, or cut short")
    assert time.monotonic() - began < 20


def test_vocabularies_of_equal_size_are_told_apart():
    a = byte_level_bpe(["the cat sat on the mat " * 9], 270, 64)
    b = byte_level_bpe(["import os, sys; print(os) " * 9], 270, 64)
    assert len(a) == len(b) and a.vocab_size == b.vocab_size
    assert not same_tokenizer(a, b) and same_tokenizer(a, byte_level_bpe(["the cat sat on the mat " * 9], 270, 64))


def test_equal_tables_that_split_differently_are_told_apart():
    from tokenizers import pre_tokenizers

    a, b = (byte_level_bpe(["the cat sat on the mat " * 9], 270, 64) for _ in range(2))
    b.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert a.get_vocab() == b.get_vocab() and vocabulary(a) != vocabulary(b)


# encoders and decoders


def test_an_encoder_loads_without_its_pooler(tmp_path):
    model = tiny("bert")
    save(model, tiny_tokenizer(), tmp_path)
    rewrite(tmp_path, lambda w: {k: v for k, v in w.items() if "pooler" not in k})
    assert torch.equal(outputs(load(tmp_path).model), outputs(model))


def test_another_decoder_loads_too(tmp_path):
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    save(model, tiny_tokenizer(), tmp_path)
    assert torch.equal(outputs(load(tmp_path).model), outputs(model))


def test_settings_of_transformers_are_left_as_they_were(folder):
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(folder)
    edit(folder, vocab_size=7)
    refused(folder)
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled())
    assert isinstance(load.__doc__, str) and Path(folder).is_dir()
