"""The hostile headers and JSON are in test_load.py: what is refused there is refused here."""

from __future__ import annotations

import json
import os

import pytest
from safetensors.torch import load_file, save_file

from smelt.model._files import header, identity
from smelt.model._load import save
from smelt.model._tiny import tiny, tiny_tokenizer


@pytest.fixture
def folder(tmp_path):
    save(tiny("llama"), tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def test_the_header_tells_names_types_and_shapes(folder):
    weights = load_file(folder / "model.safetensors")
    assert header(folder) == {name: ("F32", tuple(value.shape)) for name, value in weights.items()}


def test_the_identity_follows_every_file_that_counts(folder):
    first = identity(folder)
    (folder / "README.md").write_text("not a part of the model")
    (folder / "sub.json").mkdir()
    assert identity(folder) == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    second = identity(folder)
    held = load_file(folder / "model.safetensors")
    save_file({k: v + 1e-3 * (k == "model.norm.weight") for k, v in held.items()}, folder / "model.safetensors", {"format": "pt"})
    third = identity(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    assert len({first, second, third, identity(folder)}) == 4


def test_large_files_count_by_size_and_time(tmp_path):
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as out:
        out.truncate(100 << 20)
    first = identity(tmp_path)
    assert identity(tmp_path) == first
    os.utime(file, (1, 1))
    assert identity(tmp_path) != first
