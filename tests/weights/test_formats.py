from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from smelt.compress import compress, save_compressed
from smelt.model._load import load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError
from smelt.weights import Codes
from smelt.weights._formats import group_of, pack, packed_bytes, refuse_raw_codes
from smelt.weights.rtn import RTN


@pytest.fixture
def packed(tmp_path):
    model, report = compress(tiny("llama", layers=1), None, RTN(bits=4, group=32), [], progress=None)
    save_compressed(model, tiny_tokenizer(), tmp_path, report)
    return tmp_path, model, report


def config_of(folder, **changes):
    about = json.loads((folder / "config.json").read_text())
    about.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in about.items() if v is not None}))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_codes_without_their_configuration_are_refused(packed):
    """Plain transformers opens this with a warning and random or raw weights."""
    folder, _, _ = packed
    refuse_raw_codes(folder)
    config_of(folder, quantization_config=None)
    with pytest.raises(SmeltError, match="no quantization_config"):
        refuse_raw_codes(folder)
    with pytest.raises(SmeltError):
        load(folder)


def test_an_int8_export_that_would_load_as_raw_codes_is_refused(tmp_path):
    """The planted fault of other exporters: int8 codes under the name of the weight, a scale beside it, nothing in config.json."""
    save(tiny("llama", layers=1), tiny_tokenizer(), tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"

    def raw(tensors):
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors[name] = (tensors[name] / scale).round().to(torch.int8)
        tensors[name + "_scale"] = scale

    rewrite(tmp_path, raw)
    with pytest.raises(SmeltError, match=r"up_proj\.weight"):
        refuse_raw_codes(tmp_path)
    with pytest.raises(SmeltError, match=r"up_proj\.weight"):
        load(tmp_path)


def test_codes_without_scales_are_refused(packed):
    folder, _, _ = packed
    rewrite(folder, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight_scale"))
    with pytest.raises(SmeltError, match="without their scales"):
        refuse_raw_codes(folder)


def test_a_writer_that_forgets_the_configuration_cannot_save(tmp_path, monkeypatch):
    import smelt.weights._formats as formats

    model, report = compress(tiny("llama", layers=1), None, RTN(bits=4, group=32), [], progress=None)
    monkeypatch.setattr(formats, "_decodes", lambda folder, codes, where: config_of(folder, quantization_config=None))
    with pytest.raises(SmeltError, match="no quantization_config"):
        save_compressed(model, tiny_tokenizer(), tmp_path, report)


def test_what_reads_back_otherwise_is_refused(tmp_path, monkeypatch):
    """Packing with an error in it, here codes of the wrong sign, does not get past the writer."""
    import compressed_tensors.compressors.pack_quantized.helpers as helpers

    right = helpers.pack_to_int32
    monkeypatch.setattr(helpers, "pack_to_int32", lambda value, bits, **more: right((-value).clamp(-8, 7), bits, **more))
    model, report = compress(tiny("llama", layers=1), None, RTN(bits=4, group=32, symmetric=True), [], progress=None)
    with pytest.raises(SmeltError, match="reads back"):
        save_compressed(model, tiny_tokenizer(), tmp_path, report)


def codes(bits=4, group=32, zero=False, scale=torch.float16):
    grid = torch.zeros(4, 64 // group, dtype=torch.int8)
    return Codes(torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 64 // group).to(scale), grid if zero else None, bits, group)


@pytest.mark.parametrize(
    "second, why",
    [
        (codes(bits=3), "quantized differently"),
        (codes(group=16), "quantized differently"),
        (codes(zero=True), "quantized differently"),
        (codes(bits=9), "holds 2 to 8"),
        (codes(scale=torch.float32), "round them before"),
    ],
)
def test_what_transformers_cannot_load_is_refused_by_name(second, why, tmp_path):
    with pytest.raises(SmeltError, match=f"'b'.*{why}|{why}"):
        pack(tmp_path, torch.nn.Module(), {"a": codes(), "b": second})


def test_a_name_the_file_does_not_have(tmp_path):
    model = tiny("llama", layers=1)
    save(model, tiny_tokenizer(), tmp_path)
    with pytest.raises(SmeltError, match=r"no 'other\.weight'"):
        pack(tmp_path, model, {"other": codes()})


def test_shards_are_packed_one_by_one(tmp_path):
    model, report = compress(tiny("llama"), None, RTN(bits=4, group=32), [], progress=None)
    save(model, tiny_tokenizer(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    pack(tmp_path, model, report.codes)
    ids = torch.arange(2, 20)[None]
    with torch.no_grad():
        assert torch.equal(load(tmp_path).model(ids).logits, model(ids).logits)


def test_groups_and_bytes():
    assert group_of(-1, [64, 96], "x") == [64, 96] and group_of(32, [64, 96], "x") == [32, 32]
    with pytest.raises(
        SmeltError, match=r"x: group=64 does not divide the 96 columns some matrices have; the nearest that fits is group=32"
    ):
        group_of(64, [64, 96], "x")
    assert packed_bytes(codes()) == 4 * 4 * 8 + 2 * 4 * 2 + 16
    assert packed_bytes(codes(zero=True)) == 4 * 4 * 8 + 2 * 4 * 2 + 4 * 1 * 2 + 16
