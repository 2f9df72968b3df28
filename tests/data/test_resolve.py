"""corpus(text): a method, a path or a hub name, and what it says when it is none of them."""

from __future__ import annotations

import datasets
import pytest

from smelt.data._resolve import corpus
from smelt.data.dedup import Dedup
from smelt.data.files import Files
from smelt.data.hub import Hub
from smelt.data.stdlib import Stdlib
from smelt.spec import SmeltError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "my").mkdir()
    (tmp_path / "my" / "text.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "stdlib").write_text("a file with the name of a method")
    (tmp_path / "notes").write_text("no suffix")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("stdlib", Stdlib()),
        (" stdlib() ", Stdlib()),
        ("data.stdlib", Stdlib()),
        ("./stdlib", Files("./stdlib")),
        ("notes", Files("notes")),
        ("my", Files("my")),
        ("my/", Files("my/")),
        ("my/*.jsonl", Files("my/*.jsonl")),
        ("**/*.jsonl", Files("**/*.jsonl")),
        ("my/text.jsonl", Files("my/text.jsonl")),
        ('dedup(corpus=files(path="my/*"), scope="across")', Dedup(Files("my/*"), scope="across")),
        ("owner/name", Hub("owner/name")),
        ("owner/name-1.5", Hub("owner/name-1.5")),
        ('hub(name="my/x")', Hub("my/x")),
        (Files("my"), Files("my")),
    ],
)
def test_what_a_text_means(text, expected):
    assert corpus(text) == expected


def test_a_folder_written_by_save_to_disk():
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk("saved")
    assert corpus("saved") == Hub("saved")


@pytest.mark.parametrize(
    "text, said",
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("my/txt.jsonl", "did you mean 'my/text.jsonl'"),
        ("my/*.txt", r"no file matches 'my/\*\.txt'"),
        ("gone/*.txt", "no file matches"),
        ("my/other", r'write hub\(name="my/other"\)'),
        ("text.jsonl", "no file matches"),
        ("", "neither a corpus"),
        ("files(path=3)", "path is 3"),
        ("files(pth='x')", "did you mean 'path'"),
        ("__import__('os').system('touch ran')", "cannot|no method|not the name"),
        ("[stdlib(), stdlib()]", "no file matches"),
        ("weights.magnitude()", "."),
        (3, "3 is not a corpus"),
        (Stdlib, "is not a corpus"),
        (Files("my", validation=2.0, test=-3.0), "validation is 2.0"),
    ],
)
def test_what_is_no_corpus_is_refused_in_one_line(text, said, tmp_path):
    with pytest.raises(SmeltError, match=said) as error:
        corpus(text)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
