"""What holds for every corpus and selection, whatever it is called."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from smelt import registry
from smelt.data import SPLITS, Corpus, Document
from smelt.recipe import corpus as resolve

NAMES = registry.names("data")
TEXTS = [f"def f{i}(x):\n    return x + {i}  # é\n" for i in range(200)]


@pytest.fixture
def folder(tmp_path):
    with open(tmp_path / "train.jsonl", "w") as out:
        for text in TEXTS + TEXTS[:50]:
            out.write(json.dumps({"text": text}) + "\n")
    return tmp_path


def made(name, folder):
    """The method over the folder: its required parameters by what they are called."""
    given = {"path": str(folder), "name": str(folder)}
    cls = registry.load("data", name)
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING]
    values = {field: made(BASE, folder) if field == "corpus" else given[field] for field in required}
    return registry.build(cls, values, name)


BASE = next(n for n in NAMES if "path" in {f for f, default in registry.about("data", n).fields if not default})


@pytest.mark.parametrize("name", NAMES)
def test_streams_the_same_documents_every_time(name, folder):
    corpus = made(name, folder)
    assert isinstance(corpus, Corpus)
    for split in SPLITS:
        documents = list(itertools.islice(corpus.documents(split), 300))
        assert documents and all(type(d) is Document and d.text.strip() for d in documents)
        assert documents == list(itertools.islice(corpus.documents(split), 300))
        for document in documents:
            document.text.encode()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_unique_and_no_text_is_in_two_splits(name, folder):
    corpus = made(name, folder)
    found = {split: list(corpus.documents(split)) for split in SPLITS}
    names = [d.name for documents in found.values() for d in documents]
    assert len(names) == len(set(names))
    for a, b in itertools.combinations(SPLITS, 2):
        assert not {d.text for d in found[a]} & {d.text for d in found[b]}


@pytest.mark.parametrize("name", NAMES)
def test_a_selection_is_a_part_of_its_corpus(name, folder):
    corpus = made(name, folder)
    inner = [getattr(corpus, f.name) for f in dataclasses.fields(corpus) if f.name == "corpus"]
    for whole, split in itertools.product(inner, SPLITS):
        chosen, all_of_it = list(corpus.documents(split)), list(whole.documents(split))
        assert len(set(chosen)) == len(chosen) and set(chosen) <= set(all_of_it)


@pytest.mark.parametrize("name", NAMES)
def test_the_digest_is_short_repeats_and_follows_the_text(name, folder):
    corpus = made(name, folder)
    first = corpus.digest()
    assert first == made(name, folder).digest() and len(first) <= 100 and first.isascii() and " " not in first
    (folder / "train.jsonl").write_text(json.dumps({"text": "other"}) + "\n")
    reads_the_folder = str(folder) in repr(corpus)
    assert (corpus.digest() != first) == reads_the_folder


@pytest.mark.parametrize("name", NAMES)
def test_it_is_what_its_recipe_text_says(name, folder):
    corpus = made(name, folder)
    assert resolve(registry.text(corpus)) == corpus == registry.parse(registry.text(corpus), "data")
