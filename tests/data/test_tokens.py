"""tokenize against one document at a time, Rows against slices of a list, memory, and packed attention."""

from __future__ import annotations

import errno
import itertools
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smelt.data import Document
from smelt.data import _tokens as module
from smelt.data._tokens import LONGEST, Rows, Tokens, pieces, tokenize
from smelt.model._tiny import tiny
from smelt.spec import SmeltError


@dataclass(frozen=True)
class Listed:
    texts: tuple[str, ...]

    def documents(self, split):
        for i, text in enumerate(self.texts if split == "train" else ()):
            yield Document(str(i), text)

    def digest(self):
        return repr(self.texts)


def written(folder, documents):
    """Tokens of documents given as lists of ids; 0 ends each."""
    folder.mkdir()
    flat = [i for ids in documents for i in [*ids, 0]]
    np.asarray(flat, np.uint16).tofile(folder / "ids.bin")
    np.cumsum([0] + [len(ids) + 1 for ids in documents], dtype=np.int64).tofile(folder / "starts.bin")
    (folder / "tokens.json").write_text(json.dumps({"tokens": len(flat), "bytes": 0, "documents": len(documents), "dtype": "uint16"}))
    return Tokens(folder), flat


# tokenize


def test_ids_are_those_of_each_document_and_its_end(tmp_path, tokenizer):
    texts = tuple(f"def f{i}(x):\n    return x * {i}  # é数🙂\n" * (i % 7) for i in range(200))
    done = []
    tokens = tokenize(Listed(texts), "train", tokenizer, tmp_path / "ids", done.append)
    expected, starts = [], [0]
    for text in texts:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        starts.append(len(expected))
    assert tokens.ids.tolist() == expected and tokens.starts.tolist() == starts and len(tokens) == len(expected)
    assert tokens.bytes == sum(done) == sum(len(t.encode()) for t in texts) and tokens.documents == len(texts)
    assert tokens.ids.dtype == np.uint16 and isinstance(tokens.ids, np.memmap)
    assert tokenizer.decode(tokens.ids[: starts[7]], skip_special_tokens=True) == "".join(texts[:7])


def test_a_second_call_opens_what_is_there(tmp_path, tokenizer):
    first = tokenize(Listed(("a b c",)), "train", tokenizer, tmp_path / "ids")
    again = tokenize(Listed(("something else",)), "train", tokenizer, tmp_path / "ids")
    assert again.ids.tolist() == first.ids.tolist()


def test_lone_surrogates_do_not_stop_it(tmp_path, tokenizer):
    tokens = tokenize(Listed(("a\ud800b",)), "train", tokenizer, tmp_path / "ids")
    assert tokenizer.decode(tokens.ids[:-1]) == "a\ufffdb"


class Wide:
    """A tokenizer of 70,000 ids."""

    eos_token_id = 69_999

    def __len__(self):
        return 70_000

    def __call__(self, texts, **_):
        return {"input_ids": [[69_000 + ord(c) % 900 for c in text] for text in texts]}


def test_large_vocabularies_take_four_bytes(tmp_path):
    tokens = tokenize(Listed(("abc",)), "train", Wide(), tmp_path / "ids")
    assert tokens.ids.dtype == np.uint32 and tokens.ids.tolist() == [69_000 + ord(c) for c in "abc"] + [69_999]


def test_what_cannot_be_tokenized_is_refused_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    with pytest.raises(SmeltError, match="the test split of the data is empty"):
        tokenize(Listed(("a",)), "test", tokenizer, tmp_path / "ids")
    endless = Wide()
    endless.eos_token_id = None
    with pytest.raises(SmeltError, match="no end-of-text token"):
        tokenize(Listed(("a",)), "train", endless, tmp_path / "ids")

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(SmeltError, match="No space left"):
        tokenize(Listed(("a",)), "train", tokenizer, tmp_path / "ids")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("file", ["ids.bin", "starts.bin", "tokens.json"])
@pytest.mark.parametrize("keep", [0, 8, -2])
def test_damaged_ids_are_named(tmp_path, tokenizer, file, keep):
    folder = tmp_path / "ids"
    tokenize(Listed(("a b c d e f g", "h i j")), "train", tokenizer, folder)
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:keep])
    with pytest.raises(SmeltError, match="delete") as error:
        tokenize(Listed(("a",)), "train", tokenizer, folder)
    assert error.value.file == str(folder)


# pieces


@given(st.lists(st.text(st.sampled_from("ab\n"), max_size=60), max_size=4), st.integers(1, 20))
@settings(max_examples=200, deadline=None)
def test_pieces_end_at_line_ends_and_lose_nothing(texts, longest):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    before, module.LONGEST = module.LONGEST, longest
    try:
        found = list(pieces(iter(documents)))
    finally:
        module.LONGEST = before
    assert len({d.name for d in found}) == len(found)
    for document in documents:
        own = [d.text for d in found if d.name.split("#")[0] == document.name]
        assert "".join(own) == document.text and all(len(part) <= longest for part in own)
        for part in own[:-1]:
            assert part.endswith("\n") or ("\n" not in part and len(part) == longest)


def test_short_documents_stay_whole():
    document = Document("a", "x" * LONGEST)
    assert list(pieces(iter([document]))) == [document]


# Rows


@pytest.fixture
def stream(tmp_path):
    random = np.random.default_rng(0)
    documents = [random.integers(1, 300, random.integers(0, 40)).tolist() for _ in range(60)]
    return written(tmp_path / "ids", documents)


def test_an_epoch_covers_the_stream_once(stream):
    tokens, flat = stream
    context = 16
    rows = Rows(tokens, context, 10**6, seed=3, jitter=False)
    assert rows.per_epoch == (len(flat) - 1) // context
    starts = [rows.start(i) for i in range(rows.per_epoch)]
    assert sorted(starts) == list(range(0, rows.per_epoch * context, context))
    assert starts != sorted(starts)


def test_every_epoch_has_another_offset_and_order(stream):
    tokens, _ = stream
    context = 16
    rows = Rows(tokens, context, 10**6, seed=3)
    offsets, orders = [], []
    for epoch in range(20):
        starts = [rows.start(epoch * rows.per_epoch + i) for i in range(rows.per_epoch)]
        offsets.append(min(starts))
        orders.append(tuple(s - min(starts) for s in starts))
        assert sorted(orders[-1]) == list(range(0, rows.per_epoch * context, context))
        assert max(starts) + context + 1 <= len(tokens)
    assert all(0 <= offset < context for offset in offsets)
    assert len(set(offsets)) > 5 and len(set(orders)) == 20


def test_labels_are_the_next_tokens(stream):
    tokens, flat = stream
    rows = Rows(tokens, 16, 100, seed=1)
    assert len(rows) == 100
    for i in range(100):
        start, row = rows.start(i), rows[i]
        assert row["input_ids"].tolist() == flat[start : start + 16]
        assert row["labels"].tolist() == flat[start + 1 : start + 17]
        assert row["row"] == i and "position_ids" not in row
        assert row["input_ids"].dtype == row["labels"].dtype == torch.int64


def test_rows_follow_from_the_seed_and_the_index_alone(stream):
    tokens, _ = stream
    there = [Rows(tokens, 16, 500, seed=7)[i]["input_ids"].tolist() for i in range(0, 400, 37)]
    rows = Rows(tokens, 16, 10, seed=7)
    assert [rows[i]["input_ids"].tolist() for i in reversed(range(0, 400, 37))] == there[::-1]
    assert [Rows(tokens, 16, 500, seed=8)[i]["input_ids"].tolist() for i in range(0, 400, 37)] != there


def test_positions_start_again_at_each_document(stream):
    tokens, _ = stream
    context = 16
    rows = Rows(tokens, context, 200, seed=2, boundaries="mask")
    begins = set(tokens.starts.tolist())
    for i in range(200):
        start, expected = rows.start(i), []
        for at in range(start, start + context):
            expected.append(0 if at == start or at in begins else expected[-1] + 1)
        assert rows[i]["position_ids"].tolist() == expected


def test_too_little_text_is_refused(tmp_path):
    tokens, _ = written(tmp_path / "ids", [[1] * 30])
    assert len(Rows(tokens, 15, 1, seed=0)) == 1
    with pytest.raises(SmeltError, match="a row of 16 needs"):
        Rows(tokens, 16, 1, seed=0)
    assert Rows(tokens, 30, 1, seed=0, jitter=False)[0]["labels"].tolist() == [1] * 29 + [0]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gemma2"])
def test_a_document_in_a_packed_row_has_the_logits_it_has_alone(tmp_path, architecture):
    random = np.random.default_rng(0)
    tokens, _ = written(tmp_path / "ids", [random.integers(1, 300, n).tolist() for n in (9, 5, 14, 3, 30, 6, 11, 20, 8)])
    model = tiny(architecture)
    rows = Rows(tokens, 48, 2, seed=0, boundaries="mask")
    batch = [rows[i] for i in range(2)]
    ids, positions = (torch.stack([row[k] for row in batch]) for k in ("input_ids", "position_ids"))
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        crossing = model(input_ids=ids, use_cache=False).logits
        documents = 0
        for row in range(2):
            begins = [*torch.where(positions[row] == 0)[0].tolist(), 48]
            for begin, end in itertools.pairwise(begins):
                alone = model(input_ids=ids[row : row + 1, begin:end], use_cache=False).logits[0]
                torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-4, atol=1e-4)
                documents += begin > 0
    assert documents >= 4
    assert (packed - crossing).abs().max() > 0.1  # so the boundaries do matter


# memory

MEASURE = """
import json, resource, sys
from pathlib import Path
from smelt.data._tokens import tokenize
from smelt.data.files import Files

class Bytes:
    eos_token_id = 0
    def __len__(self): return 256
    def __call__(self, texts, **_): return {"input_ids": [list(text.encode()) for text in texts]}

peaks = []
for size in (0, 5, 20):  # the first only to have every page of the program in memory
    file = Path(sys.argv[1]) / f"{size}.txt"
    with open(file, "w") as out:
        for i in range(max(100, size * 10_000)):
            out.write(f"{i:099}\\n")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    tokenize(Files(str(file), block=1 << 16), "train", Bytes(), Path(sys.argv[1]) / f"ids{size}")
    peaks.append(int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024)
print(json.dumps(peaks))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_text(tmp_path):
    found = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], stdout=subprocess.PIPE, check=True)
    _, five, twenty = json.loads(found.stdout)
    assert (tmp_path / "ids20" / "ids.bin").stat().st_size > 3 * (tmp_path / "ids5" / "ids.bin").stat().st_size
    assert twenty - five < 5e6, (five, twenty)  # the text alone would be 15 MB more


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_gigabyte_in_a_gigabyte_and_a_half(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    try:
        from data_memory import LIMIT, measure
    finally:
        sys.path.pop(0)
    from smelt.data.stdlib import Stdlib
    from smelt.model.mistral import byte_level_bpe

    tokenizer = byte_level_bpe((d.text for d in Stdlib().documents("train")), 4096, 2048)
    assert measure(1000.0, tokenizer, tmp_path / "run")["peak"] <= LIMIT == 1.5e9
