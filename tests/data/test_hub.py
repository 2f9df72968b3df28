"""Hub on folders `datasets` reads, offline: splits of its own, splits cut by content, and one line for every error."""

from __future__ import annotations

import json
import os

import datasets
import pytest

from smelt.data import SPLITS, Document
from smelt.data._text import split_of
from smelt.data.hub import Hub
from smelt.spec import SmeltError

TEXTS = [f"row {i}\nof text {i * 7919 % 101}" for i in range(150)]


@pytest.fixture
def folder(tmp_path):
    """A folder of JSON lines with one split."""
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": t, "n": 3}) + "\n" for t in TEXTS))
    return tmp_path


def everything(corpus):
    return {split: list(corpus.documents(split)) for split in SPLITS}


def by_content(name):
    found = {split: [] for split in SPLITS}
    for i, text in enumerate(TEXTS):
        found[split_of(text, 0.04, 0.04)].append(Document(f"{name}/train:{i}", text))
    return found


def test_a_folder_of_json_lines(folder):
    found = everything(Hub(str(folder)))
    assert found == by_content(folder) and all(found.values())


def test_a_saved_dataset_with_and_without_splits(tmp_path):
    table = datasets.Dataset.from_dict({"text": TEXTS})
    table.save_to_disk(tmp_path / "one")
    assert everything(Hub(str(tmp_path / "one"))) == by_content(tmp_path / "one")
    datasets.DatasetDict({"train": table, "dev": datasets.Dataset.from_dict({"text": ["held", " ", None]})}).save_to_disk(tmp_path / "two")
    found = everything(Hub(str(tmp_path / "two")))
    assert found["validation"] == [Document(f"{tmp_path}/two/dev:0", "held")]
    expected = [split_of(t, 0.0, 0.04) for t in TEXTS]
    assert [d.text for d in found["train"]] == [t for t, s in zip(TEXTS, expected, strict=True) if s == "train"]
    assert [d.text for d in found["test"]] == [t for t, s in zip(TEXTS, expected, strict=True) if s == "test"]


def test_splits_of_its_own_are_taken_whole(folder):
    for name, text in (("validation", "v"), ("test", "t")):
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text, "n": 3}) + "\n")
    found = everything(Hub(str(folder)))
    assert [d.text for d in found["train"]] == TEXTS and [d.text for d in found["test"]] == ["t"]


def test_what_is_not_there_names_the_nearest(folder):
    with pytest.raises(SmeltError, match="no field 'texts'; did you mean 'text'"):
        everything(Hub(str(folder), field="texts"))
    with pytest.raises(SmeltError, match=r"the field 'n' .* holds int"):
        everything(Hub(str(folder), field="n"))
    with pytest.raises(SmeltError, match="no split 'trian' to train on; did you mean 'train'"):
        everything(Hub(str(folder), train="trian"))


@pytest.mark.parametrize("name", ["smelt-nobody/no-such-dataset", "nothing", "a b/c d"])
def test_a_dataset_that_is_not_here_offline(name):
    with pytest.raises(SmeltError, match=r"hub: .* cannot be read .*switched off") as error:
        next(Hub(name).documents("train"))
    assert "\n" not in str(error.value)
    with pytest.raises(SmeltError, match="cannot be read"):
        Hub(name).digest()


def test_a_loading_script_is_not_run(tmp_path):
    (tmp_path / f"{tmp_path.name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SmeltError, match="cannot be read"):
        next(Hub(str(tmp_path)).documents("train"))
    assert not (tmp_path / "ran").exists()


def test_damaged_rows_are_one_line(folder):
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text":')
    with pytest.raises(SmeltError, match="cannot be read") as error:
        everything(Hub(str(folder)))
    assert "\n" not in str(error.value)


def test_a_prepared_dataset_is_read_from_the_cache(tmp_path, monkeypatch):
    """As after an earlier download: the cache holds owner___name/configuration/version/hash with Arrow files."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    place = tmp_path / "smelt-nobody___prepared" / "default" / "0.0.0" / "0123456789abcdef"
    place.mkdir(parents=True)
    info = datasets.DatasetInfo(
        features=datasets.Features({"text": datasets.Value("string")}), builder_name="json", dataset_name="prepared", config_name="default"
    )
    info.splits = datasets.SplitDict(train=datasets.SplitInfo("train", num_examples=len(TEXTS), num_bytes=1, dataset_name="prepared"))
    info.write_to_directory(str(place))
    with datasets.arrow_writer.ArrowWriter(features=info.features, path=str(place / "prepared-train.arrow")) as writer:
        for text in TEXTS:
            writer.write({"text": text})
        writer.finalize()
    corpus = Hub("smelt-nobody/prepared")
    assert everything(corpus) == by_content("smelt-nobody/prepared")
    assert corpus.digest() == Hub("smelt-nobody/prepared").digest() != Hub("smelt-nobody/prepared", test=0.1).digest()


def test_the_digest_follows_files_and_settings(folder):
    first = Hub(str(folder)).digest()
    assert first == Hub(str(folder)).digest() != Hub(str(folder), field="n").digest()
    os.utime(folder / "train.jsonl", (1, 1))
    assert Hub(str(folder)).digest() != first


def test_settings_of_datasets_are_left_as_they_were(folder):
    before = datasets.utils.logging.get_verbosity(), datasets.utils.logging.is_progress_bar_enabled()
    everything(Hub(str(folder)))
    assert before == (datasets.utils.logging.get_verbosity(), datasets.utils.logging.is_progress_bar_enabled())
