"""A small corpus in memory and a tiny decoder with a context of 512."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from smelt.cache._calibrated import Calibrated
from smelt.data import Document
from smelt.evaluate import Variant
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer

WORDS = (
    "def",
    "return",
    "import",
    "class",
    "for",
    "in",
    "if",
    "else",
    "x",
    "y",
    "name",
    "path",
    "print",
    "self",
    "1",
    "2",
    "naïve",
    "数学",
)


@dataclass(frozen=True)
class Made:
    """`count` documents of `lines` random lines; only the test split has any."""

    count: int = 9
    lines: int = 12
    seed: int = 0
    backwards: bool = False

    def documents(self, split: str) -> Iterator[Document]:
        for at in reversed(range(self.count)) if self.backwards else range(self.count):
            draw = random.Random(1000 * self.seed + at)
            text = "".join(" ".join(draw.choices(WORDS, k=6)) + "\n" for _ in range(self.lines))
            if split == "test":
                yield Document(f"{at}.py", text)

    def digest(self) -> str:
        return "made"


@pytest.fixture
def made():
    return Made


@pytest.fixture(scope="session")
def decoder():
    return tiny("llama", hidden=128, heads=4, kv_heads=2, context=512)


@pytest.fixture(scope="session")
def teacher():
    return Loaded(tiny("llama", hidden=128, heads=4, kv_heads=2, context=512, seed=1), tiny_tokenizer(), Path())


@pytest.fixture
def variant(decoder, teacher):
    return Variant("base", decoder, tiny_tokenizer(), teacher=teacher, data=Made())


@pytest.fixture
def measured(variant, tmp_path):
    """A cache method as it can be bound to the variant: calibrated ones on a little noise."""

    def make(method):
        if not isinstance(method, Calibrated):
            return method
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, 300, (4, 64), generator=generator)
        return method.calibrated(variant.model, [ids], tmp_path / f"{type(method).__name__}{hash(method)}")

    return make
