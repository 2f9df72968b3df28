from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from smelt.data import Document
from smelt.data import miniplm as module
from smelt.data._bigram import Bigram
from smelt.data.miniplm import MiniPLM, difference
from smelt.data.stdlib import Stdlib
from smelt.model._load import Loaded, load, save
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

LINES = ["def f(x):\n", "    return x + 1\n", "import os\n", "for name in os.listdir('.'):\n", "    print(name)\n", "naïve = '数学'\n"]


@dataclass(frozen=True)
class Made:
    """`count` documents of 1 to 30 lines in every split."""

    count: int = 8
    empty: str = ""

    def documents(self, split):
        draw = np.random.default_rng(["train", "validation", "test"].index(split))
        for at in range(0 if split == self.empty else self.count):
            yield Document(f"{split}{at}", "".join(LINES[i] for i in draw.integers(len(LINES), size=draw.integers(1, 30))))

    def digest(self):
        return f"made{self.count}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    place = tmp_path_factory.mktemp("models")
    for name, seed in (("teacher", 1), ("reference", 2)):
        save(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1, seed=seed), tiny_tokenizer(), place / name)
    return {name: str(place / name) for name in ("teacher", "reference")}


def mean_log(name, ids):
    """One token after the other, in float64, after the end-of-text token."""
    model = load(name).model.double()
    row = [0, *ids]
    total = 0.0
    for at in range(1, len(row)):
        with torch.no_grad():
            total += float(model(input_ids=torch.tensor([row[:at]])).logits[0, -1].log_softmax(-1)[row[at]])
    return total / len(ids)


def test_keeps_the_chunks_with_the_largest_difference_of_means(models, monkeypatch):
    monkeypatch.setattr(module, "WAITING", 3)
    monkeypatch.setattr(module, "LOGITS", 320 * 40)
    corpus, chunk = Made(4), 24
    tokenizer = tiny_tokenizer()
    method = MiniPLM(corpus, keep=0.4, chunk=chunk, **models)
    scores, _ = method.scores()
    texts, expected = [], []
    for document in corpus.documents("train"):
        made = tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [a for a, _ in made["offset_mapping"]]
        for at in range(0, len(starts), chunk):
            ids = made["input_ids"][at : at + chunk]
            end = starts[at + chunk] if at + chunk < len(starts) else len(document.text)
            texts.append(document.text[starts[at] : end])
            expected.append(mean_log(models["teacher"], ids) - mean_log(models["reference"], ids))
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert len(texts) > 15
    floor = sorted(expected, reverse=True)[round(0.4 * len(texts)) - 1]
    assert [d.text for d in method.documents("train")] == [t for t, r in zip(texts, expected, strict=True) if r >= floor - 1e-6]
    whole = list(MiniPLM(corpus, keep=1.0, chunk=chunk, **models).documents("train"))
    assert [d.text for d in whole] == texts and len({d.name for d in whole}) == len(whole)
    assert "".join(texts) == "".join(d.text for d in corpus.documents("train"))


def test_a_model_beside_itself_says_nothing_and_the_order_decides(models):
    method = MiniPLM(Made(), chunk=256, teacher=models["teacher"], reference=models["teacher"])
    assert not method.scores()[0].any()
    assert list(method.documents("train")) == list(Made().documents("train"))[:4]


def test_a_larger_share_keeps_all_that_a_smaller_one_keeps(models):
    chosen = [set(MiniPLM(Made(), keep=keep, chunk=16, **models).documents("train")) for keep in (0.01, 0.2, 0.5, 0.9, 1.0)]
    assert all(a < b for a, b in itertools.pairwise(chosen)) and len(chosen[0]) == 1


def test_held_out_splits_are_left_as_they_are_and_the_pool_is_a_part(models):
    method = MiniPLM(Made(40), keep=1.0, pool=0.5, chunk=256, **models)
    for split in ("validation", "test"):
        assert list(method.documents(split)) == list(Made(40).documents(split))
    pool = list(method.documents("train"))
    assert set(pool) < set(Made(40).documents("train")) and 10 <= len(pool) <= 30
    assert set(MiniPLM(Made(40), keep=1.0, pool=0.2, chunk=256, **models).documents("train")) < set(pool)


def noise(kind, clean, draw, vocab):
    every = np.concatenate(clean)
    if kind == "uniform":
        return [draw.integers(2, vocab, len(row)) for row in clean]
    if kind == "shuffled":
        return [draw.permutation(row) for row in clean]
    if kind == "unigram":
        return [draw.choice(every, len(row)) for row in clean]
    return [np.tile(row[:8], len(row) // 8) for row in clean]


def test_planted_noise_is_told_from_clean_text():
    """A fifth of noise: the area under the curve of the embedded model beside the counted reference."""
    teacher, draw = load("embedded"), np.random.default_rng(0)
    reference = MiniPLM(Stdlib())._counted(teacher.tokenizer)
    text = "".join(d.text for d in itertools.islice(Stdlib().documents("test"), 12))
    ids = teacher.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    rows = [np.array(ids[at : at + 96]) for at in range(0, 96 * 60, 96)]
    clean = rows[:48]
    eos = teacher.tokenizer.eos_token_id
    good = difference([[eos, *row] for row in clean], teacher, reference)
    area = {}
    for kind in ("uniform", "shuffled", "unigram", "repeats"):
        bad = difference([[eos, *row] for row in noise(kind, rows[48:], draw, len(teacher.tokenizer))], teacher, reference)
        area[kind] = (good[:, None] > bad).mean()
    assert min(area[kind] for kind in ("uniform", "shuffled", "unigram")) >= 0.99, area
    assert area["repeats"] < 0.5, area  # what the docstring warns of: the teacher copies and bigrams cannot


def test_the_counted_reference_is_that_of_the_validation_split(models):
    tokenizer = tiny_tokenizer()
    rows = [[0, *tokenizer(d.text, add_special_tokens=False)["input_ids"]] for d in Made().documents("validation")]
    expected, got = Bigram(rows, len(tokenizer)), MiniPLM(Made(), teacher=models["teacher"], chunk=64)._counted(tokenizer)
    assert np.array_equal(expected.keys, got.keys) and np.array_equal(expected.counts, got.counts)
    row = rows[0]
    loaded = load(models["teacher"])
    r = difference([row], loaded, got)[0]
    assert r == pytest.approx(mean_log(models["teacher"], row[1:]) - expected.log_probabilities(row).mean(), abs=1e-5)
    assert math.isfinite(r)


def test_the_digest_follows_settings_models_and_corpus(models):
    given = {"corpus": Made(), "chunk": 64, **models}
    changes = [{}, {"keep": 0.4}, {"chunk": 65}, {"pool": 0.9}, {"reference": ""}, {"teacher": models["reference"]}, {"corpus": Made(9)}]
    digests = {MiniPLM(**{**given, **change}).digest() for change in changes}
    assert len(digests) == len(changes) and MiniPLM(**given).digest() in digests


def test_what_cannot_be_is_refused(models, tmp_path):
    other = tiny_tokenizer(300)
    save(tiny(layers=1, hidden=16, ffn=24, heads=2, kv_heads=1), other, tmp_path / "other")
    with pytest.raises(SmeltError, match="differ in their tokenizers"):
        MiniPLM(Made(), chunk=64, teacher=models["teacher"], reference=str(tmp_path / "other")).scores()
    with pytest.raises(SmeltError, match="chunk=1024 is longer than the 256 positions"):
        MiniPLM(Made(), **models).scores()
    with pytest.raises(SmeltError, match="validation split is empty"):
        MiniPLM(Made(empty="validation"), chunk=64, teacher=models["teacher"]).scores()
    with pytest.raises(SmeltError, match="no text"):
        MiniPLM(Made(empty="train"), chunk=64, **models).scores()
    save(tiny("bert", hidden=16, ffn=24, heads=2), tiny_tokenizer(), tmp_path / "encoder")
    with pytest.raises(SmeltError, match="does not predict"):
        MiniPLM(Made(), chunk=64, teacher=str(tmp_path / "encoder")).scores()
    assert isinstance(load(models["teacher"]), Loaded)
