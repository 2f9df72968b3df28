"""Files: every format against what was written, splits, cuts, and one clear line for everything malformed."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.data import SPLITS, Document
from smelt.data._text import split_of
from smelt.data.files import LARGE, SMALL, Files
from smelt.spec import SmeltError

TEXTS = [f"document {i}\nwith a second line é {i * i}\n" for i in range(300)]


def everything(corpus):
    return {split: list(corpus.documents(split)) for split in SPLITS}


def rows(path, texts=TEXTS, field="text", open=open):
    with open(path, "wt", encoding="utf-8") as out:
        for i, text in enumerate(texts):
            out.write(json.dumps({"id": i, field: text}) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".jsonl.gz", ".jsonl.bz2", ".jsonl.xz", ".parquet"])
def test_rows_of_every_format(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"n": range(len(TEXTS)), "text": TEXTS}), path, row_group_size=70)
    else:
        rows(path, open={".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}.get(path.suffix, open))
    found = everything(Files(str(path)))
    for split in SPLITS:
        expected = [Document(f"{path}:{i + 1}", t) for i, t in enumerate(TEXTS) if split_of(t, 0.04, 0.04) == split]
        assert found[split] == expected and expected


def test_small_text_files_are_whole_documents(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    written = {}
    for i, text in enumerate(TEXTS):
        path = tmp_path / ("deep/er" if i % 3 else "deep") / f"{i}.{('py', 'md', 'txt')[i % 3]}"
        path.write_text(text, encoding="utf-8")
        written[str(path)] = text
    for pattern in (tmp_path, tmp_path / "**" / "*"):
        found = everything(Files(str(pattern)))
        assert {d.name: d.text for documents in found.values() for d in documents} == written
        for split in SPLITS:
            assert [d.name for d in found[split]] == sorted(d.name for d in found[split])
            assert all(split_of(d.text, 0.04, 0.04) == split for d in found[split])


@given(text=st.text(st.sampled_from("ab é\n"), max_size=200), block=st.integers(1, 40), pack=st.booleans())
@settings(max_examples=60, deadline=None)
def test_long_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path_factory, text, block, pack):
    path = tmp_path_factory.mktemp("cut") / ("a.txt.gz" if pack else "a.txt")
    path.write_bytes(gzip.compress(text.encode()) if pack else text.encode())
    documents = list(Files(str(path), block=block, validation=0.0, test=0.0).documents("train"))
    names = [d.name for d in documents]
    assert len(set(names)) == len(names) and all(0 < len(d.text) <= block for d in documents)
    reference, rest = [], text  # the same cuts on the whole text
    while len(rest) > block:
        cut = rest.rfind("\n", 0, block) + 1 or block
        reference.append(rest[:cut])
        rest = rest[cut:]
    reference.append(rest)
    assert [d.text for d in documents] == [part for part in reference if part.strip()]


def test_a_block_of_zero_follows_from_the_size(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a line of text\n" * 100_000)
    found = [d for documents in everything(Files(str(path))).values() for d in documents]
    assert SMALL // 2 < max(len(d.text) for d in found) <= SMALL
    assert sum(len(d.text) for d in found) == path.stat().st_size
    assert len({d.name for d in found}) == len(found)
    with open(path, "wb") as out:
        out.truncate(400 * LARGE)  # a hole: its size counts, its text is not read
    from smelt.data import files

    assert files._block(path.stat().st_size) == LARGE and files._block(0) == SMALL and files._block(256 * 2 * SMALL) == 2 * SMALL


def test_copies_never_cross_splits(tmp_path):
    rows(tmp_path / "a.jsonl")
    rows(tmp_path / "b.jsonl", [f"  {t.replace(' ', chr(10))}" for t in TEXTS])
    found = {split: {"".join(d.text.split()) for d in documents} for split, documents in everything(Files(str(tmp_path))).items()}
    assert all(found.values())
    assert not found["train"] & found["test"] and not found["train"] & found["validation"] and not found["validation"] & found["test"]


def test_globs_hold_files_out(tmp_path):
    for name, part in (("a", TEXTS[:100]), ("b", TEXTS[100:200]), ("held", TEXTS[200:])):
        rows(tmp_path / f"{name}.jsonl", part)
    found = everything(Files(f"{tmp_path}/*.jsonl", validation=0.1, test=f"{tmp_path}/held*"))
    assert [d.text for d in found["test"]] == TEXTS[200:]
    assert sorted(d.text for d in found["train"] + found["validation"]) == sorted(TEXTS[:200])
    assert 0 < len(found["validation"]) < 50


def test_rows_without_text_are_skipped_and_surrogates_replaced(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": " "}\n{"text": null}\n{"text": "b\\ud800"}\n')
    assert list(Files(str(path), validation=0.0, test=0.0).documents("train")) == [
        Document(f"{path}:1", "a"),
        Document(f"{path}:5", "b\ufffd"),
    ]


def test_byte_order_marks_are_dropped(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hi"}\n')
    assert [d.text for d in Files(str(tmp_path), validation=0.0, test=0.0).documents("train")] == ["hello", "hi"]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"text": "a"', "not a JSON object"),
        ("[1, 2]", "here is a list"),
        ("3", "here is a number"),
        ('"a"', "here is a string"),
        ("null", "here is a null"),
        ('{"texts": "a"}', "there is no field 'text'; did you mean 'texts'?"),
        ('{"text": 3}', "holds a number"),
        ('{"text": ["a"]}', "holds a list"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "not a JSON object"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_malformed_rows_are_named_by_file_and_line(tmp_path, line, said, name):
    path = tmp_path / name
    data = ('{"text": "a"}\n\n' + line + "\n").encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    with pytest.raises(SmeltError) as error:
        everything(Files(str(path)))
    assert (error.value.file, error.value.line) == (str(path), 3) and said in str(error.value) and "\n" not in str(error.value)


def test_a_json_array_is_told_how_to_become_lines(tmp_path):
    (tmp_path / "a.json").write_text('[\n{"text": "a"}\n]\n')
    with pytest.raises(SmeltError, match=r"a\.json:1: .*one object per line"):
        everything(Files(str(tmp_path)))


def test_text_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 30_000 + b"bad \xff line\n")
    with pytest.raises(SmeltError, match="not UTF-8") as error:
        everything(Files(str(path)))
    assert error.value.line == 30_001


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.jsonl.gz", "a.parquet"])
@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_damaged_files_are_named(tmp_path, name, damage):
    path = tmp_path / name
    whole = "\n".join(json.dumps({"text": t}) for t in TEXTS).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": TEXTS}), path)
    else:
        path.write_bytes({".gz": gzip, ".bz2": bz2, ".xz": lzma}[path.suffix].compress(whole))
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "noise": os.urandom(500), "empty": b""}[damage])
    try:
        found = everything(Files(str(path)))
    except SmeltError as error:
        assert error.file == str(path)
    else:
        assert damage == "empty" and not any(found.values())  # an empty gzip file is an empty text


def test_parquet_columns_are_checked(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"texts": ["a"], "n": [1]}), path)
    with pytest.raises(SmeltError, match="no column 'text'; did you mean 'texts'"):
        everything(Files(str(path)))
    with pytest.raises(SmeltError, match="holds int64"):
        everything(Files(str(path), field="n"))


def test_nothing_found_names_the_nearest(tmp_path):
    rows(tmp_path / "data.jsonl")
    with pytest.raises(SmeltError, match=r"no file matches .*data\.json'.*did you mean '.*data\.jsonl'"):
        everything(Files(f"{tmp_path}/data.json"))
    with pytest.raises(SmeltError, match="no file matches"):
        Files(f"{tmp_path}/none/*.txt").digest()


def test_shares_that_leave_nothing_are_refused():
    with pytest.raises(SmeltError, match="leave nothing to train on"):
        Files("x", validation=0.5, test=0.5)


def test_the_digest_follows_files_and_settings(tmp_path):
    path = tmp_path / "a.jsonl"
    rows(path)
    first = Files(str(path)).digest()
    assert first == Files(str(path)).digest() != Files(str(path), test=0.1).digest()
    os.utime(path, (1, 1))
    touched = Files(str(path)).digest()
    assert touched != first
    rows(tmp_path / "b.jsonl")
    assert Files(f"{tmp_path}/*").digest() != Files(f"{tmp_path}/a*").digest()


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_python_memory_does_not_grow_with_the_file(tmp_path, suffix):
    peaks = []
    for megabytes in (1, 4):
        path = tmp_path / f"{megabytes}{suffix}"
        texts = [f"line {i} " + "x" * 9990 for i in range(100 * megabytes)]
        if suffix == ".parquet":
            pq.write_table(pa.table({"text": texts}), path)
        elif suffix == ".jsonl":
            rows(path, texts)
        else:
            path.write_text("\n".join(texts))
        del texts
        corpus = Files(str(path), block=4 * SMALL)
        sum(len(d.text) for d in corpus.documents("test"))  # imports
        tracemalloc.start()
        assert sum(len(d.text) for d in corpus.documents("train")) > 700_000 * megabytes
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 200_000, peaks
