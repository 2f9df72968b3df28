"""The standard library: splits by module, no text in two splits, nothing empty."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from smelt.data import SPLITS
from smelt.data.stdlib import SKIP, Stdlib, _split
from smelt.spec import SmeltError


@pytest.fixture(scope="module")
def found():
    return {split: list(Stdlib().documents(split)) for split in SPLITS}


def test_a_module_is_in_one_split(found):
    modules = {split: {Path(d.name).parts[0].removesuffix(".py") for d in found[split]} for split in SPLITS}
    assert all(modules.values())
    assert not modules["train"] & modules["test"] and not modules["train"] & modules["validation"]
    assert all(_split(module) == split for split in SPLITS for module in modules[split])
    assert _split("json") == _split("json.py")


def test_no_text_is_in_two_splits_or_twice(found):
    texts = [d.text for split in SPLITS for d in found[split]]
    assert len(texts) == len(set(texts)) and all(text.strip() for text in texts)


def test_it_is_code_and_mostly_training_text(found):
    size = {split: sum(len(d.text.encode("utf-8", "replace")) for d in found[split]) for split in SPLITS}
    assert size["train"] > 4e6 and size["test"] > 2e5 and size["validation"] > 1e5
    names = [d.name for split in SPLITS for d in found[split]]
    assert len(names) == len(set(names)) and all(name.endswith(".py") and not SKIP & set(Path(name).parts) for name in names)
    root = Path(sysconfig.get_path("stdlib"))
    some = found["test"][0]
    assert (root / some.name).read_text(encoding="utf-8", errors="replace") == some.text


def test_packages_narrow_the_train_split_only(found):
    part = Stdlib(packages=("json", "argparse"))
    assert list(part.documents("train")) == [d for d in found["train"] if d.name == "argparse.py" or d.name.startswith("json/")]
    assert all(list(part.documents(split)) == found[split] for split in ("test", "validation"))
    assert Stdlib().digest() != part.digest() == Stdlib(packages=("argparse", "json")).digest()


def test_packages_that_cannot_be_trained_on_are_refused():
    with pytest.raises(SmeltError, match="no module or package 'asincio'; did you mean 'asyncio'"):
        Stdlib(packages=("asincio",))
    with pytest.raises(SmeltError, match="'unittest' is in the test split"):
        Stdlib(packages=("asyncio", "unittest"))
