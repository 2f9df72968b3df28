"""Fixtures every test may use. One thread, no network, no telemetry."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models gain nothing from a second thread, and wait in circles for it beside other work

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def model():
    """A tiny random llama-like decoder: 2 layers, hidden 64, 4 query and 2 key/value heads, 320 tokens."""
    from smelt.model._tiny import tiny

    return tiny("llama")


@pytest.fixture
def tokenizer():
    from smelt.model._tiny import tiny_tokenizer

    return tiny_tokenizer()


@pytest.fixture
def shared():
    """The shared test data beside the checkout; the test skips without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no shared/data beside this checkout")
    return folder
