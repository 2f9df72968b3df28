"""Files of retrieval: what reads, what is written, and what every wrong line is told."""

from __future__ import annotations

import json
import os

import pytest

from smelt._ranking_files import read_corpus, read_qrels, read_queries, read_run, whole, write_jsonl, write_run
from smelt.spec import SmeltError


@pytest.fixture
def file(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_tab_separated_texts(file):
    found = read_queries(file("q.tsv", "1\tadd two\n\n2\twith\ta tab\n3\t\nдва\t数学 🙂\u2028of one line\n"))
    assert found == {"1": "add two", "2": "with\ta tab", "3": "", "два": "数学 🙂\u2028of one line"}


def test_carriage_returns_byte_order_mark_and_no_last_line_end(file):
    assert read_queries(file("q.tsv", b"\xef\xbb\xbfq1\tone\r\nq2\ttwo\r\n\r\nq3\tthree")) == {"q1": "one", "q2": "two", "q3": "three"}
    assert read_corpus(file("d.jsonl", b'\xef\xbb\xbf{"_id": "a", "text": "x"}\r\n')) == {"a": "x"}


def test_title_and_text_are_joined_as_in_beir(file):
    rows = [
        {"_id": "a", "title": "Title", "text": "text", "metadata": {}},
        {"_id": "b", "title": "", "text": "text"},
        {"_id": "c", "title": None, "text": "text"},
        {"_id": 4, "text": ""},
        {"_id": "e", "title": "Title", "text": ""},
    ]
    path = file("d.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert read_corpus(path) == {"a": "Title text", "b": "text", "c": "text", "4": "", "e": "Title"}
    assert read_queries(path)["a"] == "text"


def test_half_a_surrogate_pair_becomes_writable(file):
    found = read_corpus(file("d.jsonl", '{"_id": "a", "text": "x\\ud83dy \\ud83d\\ude42"}\n'))
    assert found["a"] == "x\ufffdy 🙂"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("q.tsv", "1\ta\n2 b\n", r"q.tsv:2: there is no tab; a line is id<TAB>text$"),
        ("q.tsv", '{"_id": "1"}\n', r"q.tsv:1: there is no tab.*ends in .jsonl"),
        ("q.tsv", "1\ta\n\n2\tb\n1\tc\n", r"q.tsv:4: the id '1' is already in line 1$"),
        ("q.tsv", "\ta\n", r"q.tsv:1: an empty id"),
        ("q.tsv", "a b\tc\n", r"q.tsv:1: the id 'a b' has a blank in it"),
        ("q.tsv", "a \tc\n", r"q.tsv:1: the id 'a ' has a blank in it"),
        ("q.tsv", b"1\ta\n2\t\xff\n", r"q.tsv:2: not UTF-8 \(byte 0xff at 3\)"),
        ("q.tsv", "", r"q.tsv: there is no query in it"),
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "2", text: "b"}\n', r"q.jsonl:2: not JSON \(.* at column 14\); a line is"),
        ("q.jsonl", "[" * 100_000 + "\n", r"q.jsonl:1: not JSON"),
        ("q.jsonl", "[1]\n", r"q.jsonl:1: not a JSON object"),
        ("q.jsonl", '{"id": "1", "text": "a"}\n', r"q.jsonl:1: there is no '_id' but id, text; a line is"),
        ("q.jsonl", '{"_id": "1", "body": "a"}\n', r"q.jsonl:1: there is no 'text' but _id, body"),
        ("q.jsonl", '{"_id": 1.5, "text": "a"}\n', r"q.jsonl:1: the _id is 1.5 and not a string"),
        ("q.jsonl", '{"_id": "", "text": "a"}\n', r"q.jsonl:1: an empty id"),
        ("q.jsonl", '{"_id": "1", "text": ["a"]}\n', r'q.jsonl:1: the text is \["a"\] and not a string'),
        ("q.jsonl", '{"_id": "1", "text": "a"}\n{"_id": 1, "text": "a"}\n', r"q.jsonl:2: the id '1' is already in line 1"),
    ],
)
def test_a_wrong_line_is_named(file, name, content, said):
    with pytest.raises(SmeltError, match=said):
        read_queries(file(name, content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(SmeltError, match=r"none.tsv: cannot be read: No such file"):
        read_queries(tmp_path / "none.tsv")
    with pytest.raises(SmeltError, match=r"cannot be read: Is a directory"):
        read_queries(tmp_path)


def test_a_run_is_ordered_by_score_then_rank(file):
    lines = "q Q0 a 1 0.5 x\nq Q0 b 2 2.5 x\nq\tQ0\tc 4 0.5 x\np Q0 a 1 -1e3 x\nq Q0 d 3 5e-1 x\n"
    assert read_run(file("r.trec", lines), dict.fromkeys("abcd", "")) == {"q": ["b", "a", "d", "c"], "p": ["a"]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("q Q0 doc1 1 0.5\n", r"r.trec:1: 5 columns; a line of a run is 'query Q0 passage rank score tag'"),
        ("q Q0 doc1 1 0.5 t\nq Q0 doc7 1 0.5 t\n", r"r.trec:2: the passage 'doc7' is not in the corpus; did you mean 'doc1'\?"),
        ("q Q0 doc1 first 0.5 t\n", r"r.trec:1: rank 'first' and score '0.5' are not a whole and a finite number"),
        ("q Q0 doc1 1 nan t\n", r"r.trec:1: rank '1' and score 'nan'"),
        ("q Q0 doc1 1 1 t\np Q0 doc1 1 1 t\nq Q0 doc1 2 0 t\n", r"r.trec:3: the passage 'doc1' of query 'q' is already in line 1"),
        ("\n\n", r"r.trec: there is no candidate in it"),
    ],
)
def test_a_wrong_line_of_a_run_is_named(file, content, said):
    with pytest.raises(SmeltError, match=said):
        read_run(file("r.trec", content), {"doc1": "", "other": ""})


def test_judgements_of_both_kinds(file):
    wanted = {"q1": {"a": 2, "b": 0}, "q2": {"a": -1}}
    assert read_qrels(file("trec.txt", "q1 0 a 2\nq1 0 b 0\nq2 Q0 a -1\n"), {"q1", "q2"}) == wanted
    assert read_qrels(file("beir.tsv", "query-id\tcorpus-id\tscore\r\nq1\ta\t2\r\nq1\tb\t0\r\nq2\ta\t-1\r\n"), {"q1", "q2"}) == wanted
    assert read_qrels(file("bare.tsv", "q1\ta\t2\nq1\tb\t0\nq2\ta\t-1\n"), {"q1", "q2", "unjudged"}) == wanted


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("query1 0 a 1\nquerx 0 a 1\n", r"j.txt:2: the query 'querx' is judged here and not among those asked; did you mean 'query1'\?"),
        ("query1 0 a 1\nquery1 a 1\n", r"j.txt:2: 3 columns; a line is 'query 0 passage grade'"),
        ("query1 0 a b 1\n", r"j.txt:1: 5 columns"),
        ("query1 0 a yes\n", r"j.txt:1: the grade 'yes' is not a whole number"),
        ("q d s\nquery1 a 0.5\n", r"j.txt:2: the grade '0.5' is not a whole number"),
        ("query1 0 a 1\nquery1 0 a 1\n", r"j.txt:2: the judgement of 'a' for query 'query1' is already in line 1"),
        ("query-id\tcorpus-id\tscore\n", r"j.txt: there is no judgement in it"),
    ],
)
def test_a_wrong_line_of_judgements_is_named(file, content, said):
    with pytest.raises(SmeltError, match=said):
        read_qrels(file("j.txt", content), ["query1"])


def test_a_run_that_was_written_reads_back_and_has_no_ties(tmp_path):
    orders = {"q": ["c", "a", "数"], "none": [], "p": ["a"]}
    write_run(tmp_path / "deep" / "r.trec", orders, "tag")
    lines = (tmp_path / "deep" / "r.trec").read_text(encoding="utf-8").splitlines()
    assert lines == ["q Q0 c 1 3 tag", "q Q0 a 2 2 tag", "q Q0 数 3 1 tag", "p Q0 a 1 1 tag"]
    assert read_run(tmp_path / "deep" / "r.trec", dict.fromkeys("ca数", "")) == {q: o for q, o in orders.items() if o}


def test_json_lines_have_the_judges_scores(tmp_path):
    write_jsonl(tmp_path / "r.jsonl", {"q": [("数", 0.5), ("b", None)], "none": []}, "t")
    first, second = map(json.loads, (tmp_path / "r.jsonl").read_text(encoding="utf-8").splitlines())
    rows = [{"_id": "数", "rank": 1, "score": 0.5}, {"_id": "b", "rank": 2, "score": None}]
    assert first == {"query": "q", "tag": "t", "passages": rows} and second == {"query": "none", "tag": "t", "passages": []}


def test_a_file_is_whole_or_as_it_was(tmp_path, monkeypatch):
    place = tmp_path / "r.trec"
    place.write_text("before")
    with pytest.raises(ZeroDivisionError), whole(place) as out:
        out.write("half")
        raise ZeroDivisionError
    assert place.read_text() == "before" and os.listdir(tmp_path) == ["r.trec"]

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(SmeltError, match=r"r.trec: cannot be written: No space left"):
        patch.setattr(os, "fsync", full)
        write_run(place, {"q": ["a"]}, "t")
    assert place.read_text() == "before" and os.listdir(tmp_path) == ["r.trec"]
