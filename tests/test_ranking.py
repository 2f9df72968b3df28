"""The verb: what it asks, what it never asks twice, and what it says an order is worth."""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

import smelt
from smelt import ranking, registry
from smelt.data._code_search import functions
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Answer, Asked, Judge, Retriever
from smelt.rank._order import sort
from smelt.rank.sliding_window import SlidingWindow
from smelt.ranking import CHANCE, ORACLE, Ranked, evaluate, rank, rank_files, rank_queries
from smelt.spec import SmeltError

SEEN: list = []  # what the judges of this file were asked; a field would be a part of their text
BREAKS: list = []  # the question at which they break


@dataclass(frozen=True)
class Number(Judge):
    """order = argsort of -number each passage begins with."""

    def answers(self, asked, model):
        for one in asked:
            if one.query in BREAKS:
                raise RuntimeError("out of memory")
            SEEN.append(one)
        return [Answer(sorted(range(len(a.passages)), key=lambda i: -float(a.passages[i].split()[0])), None) for a in asked]


@dataclass(frozen=True)
class Overlap(Retriever):
    """score = |words of the query in the passage|."""

    comparable = True
    bonus: float = 0.0

    def scores(self, asked, model):
        return [
            torch.tensor([len(set(a.query.split()) & set(p.split())) + self.bonus for p in a.passages], dtype=torch.float64) for a in asked
        ]

    def answers(self, asked, model):
        SEEN.extend(asked)
        return sort(self.scores(asked, model))

    def index(self, passages, model):
        SEEN.append("index")
        return list(passages)

    def search(self, index, queries, k, model):
        SEEN.extend(queries)
        asked = [ranking.Asked(q, index) for q in queries]
        return [[(i, float(s[i])) for i in a.order[:k]] for a, s in zip(sort(self.scores(asked, model)), self.scores(asked, model))]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    monkeypatch.setitem(registry._NAMES, Number, ("rank", "number"))
    monkeypatch.setitem(registry._NAMES, Overlap, ("rank", "overlap"))
    SEEN.clear()
    BREAKS.clear()


@pytest.fixture
def small():
    return Loaded(tiny("llama", context=1024), tiny_tokenizer(), None)


@pytest.fixture
def files(tmp_path):
    """Twelve queries, thirty passages `number w..`; query i asks for the words i and i + 1."""
    queries = "".join(f"q{i}\tw{i} w{i + 1}\n" for i in range(12))
    shuffle = random.Random(1)
    corpus = "".join(
        json.dumps({"_id": f"d{i}", "title": f"{shuffle.randrange(100)}", "text": " ".join(f"w{shuffle.randrange(13)}" for _ in range(5))})
        + "\n"
        for i in range(30)
    )
    (tmp_path / "q.tsv").write_text(queries)
    (tmp_path / "docs.jsonl").write_text(corpus)
    return tmp_path / "q.tsv", tmp_path / "docs.jsonl", tmp_path / "out.trec"


def orders(file):
    found: dict = {}
    for line in file.read_text().splitlines():
        query, q0, passage, place, score, tag = line.split()
        found.setdefault(query, []).append((passage, int(place), float(score), tag))
        assert q0 == "Q0"
    return found


# Python


def test_rank_gives_places_scores_and_texts():
    passages = ["1 a", "", "3 a b", "2 b"]
    assert rank(None, "a b", passages, Overlap()) == [
        Ranked(2, 2.0, "3 a b"),
        Ranked(0, 1.0, "1 a"),
        Ranked(3, 1.0, "2 b"),
        Ranked(1, 0.0, ""),
    ]
    assert rank(None, "a", ["1 x", "3 y", "2 z"], Number()) == [Ranked(1, None, "3 y"), Ranked(2, None, "2 z"), Ranked(0, None, "1 x")]
    assert [r.place for r in rank(None, "a", [f"{i} x" for i in range(9)], SlidingWindow(Number(), 4, 2))][:2] == [8, 7]
    assert rank(None, "a", [], Number()) == [] and rank(None, "a", ["5 x"], Overlap()) == [Ranked(0, 0.0, "5 x")]


def test_the_family_is_the_verb(small):
    texts = ["def f(x): return x", "import os", "class A: pass"]
    found = smelt.rank(small, "a class", texts)
    assert sorted(r.place for r in found) == [0, 1, 2] and all(texts[r.place] == r.text for r in found)
    assert found == smelt.rank(small, "a class", texts, "pointwise()")
    assert smelt.rank.first_token.FirstToken is registry.load("rank", "first_token")


def test_import_smelt_stays_light_and_the_verb_is_there():
    code = (
        "import sys, smelt\n"
        "assert not {'torch', 'numpy', 'smelt.rank'} & set(sys.modules)\n"
        "assert callable(smelt.rank) and smelt.rank is sys.modules['smelt.rank']\n"
        "import smelt.rank.first_token\n"
        "assert smelt.rank(None, 'q', [], smelt.rank.first_token.FirstToken()) == []\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((None, "q", ["a"]), "without a model a method must be named"),
        ((None, 7, ["a"], "first_token()"), "the query is a int"),
        ((None, "q", "abc", "first_token()"), "the passages are one text; they should be a list"),
        ((None, "q", ["a", None], "first_token()"), "passage 1 is a NoneType"),
        ((None, "q", ["a", "b"], "first_tokens()"), "did you mean 'first_token'"),
        ((None, "q", ["a", "b"], "[first_token(), first_token()]"), "one method orders"),
        ((None, "q", ["a", "b"], 7), "7 is not a method of rank"),
        ((7, "q", ["a", "b"], "first_token()"), "a model is a name, a folder or what smelt.load returns"),
        ((None, "q", ["a", "b"], "first_token()"), "needs a decoder"),
    ],
)
def test_what_python_is_told(arguments, said):
    with pytest.raises(SmeltError, match=said):
        rank(*arguments)


def test_many_queries_are_each_alone_and_a_journal_keeps_them(tmp_path, small):
    asked = [(f"q{i}", [f"{random.Random(i + j).randrange(99)} x" for j in range(i)]) for i in range(9)] + [("q3", ["1 x", "2 x"])] * 2
    alone = [rank(None, q, p, Number()) for q, p in asked]
    SEEN.clear()
    assert rank_queries(small, asked, Number(), batch=4, journal=tmp_path / "j") == alone
    once = len(SEEN)
    assert once == 8  # no question without passages or with one, and the equal ones once
    assert rank_queries(small, asked, Number(), journal=tmp_path / "j") == alone and len(SEEN) == once
    other = Loaded(tiny("llama", seed=1), small.tokenizer, None)
    assert rank_queries(other, asked, Number(), journal=tmp_path / "j") == alone and len(SEEN) == 2 * once  # other weights
    assert rank_queries(small, asked, SlidingWindow(Number()), journal=tmp_path / "j") == alone and len(SEEN) == 3 * once


def test_a_trained_folder_names_its_method(tmp_path, small):
    (tmp_path / "config.json").write_text("{}")
    here = small._replace(folder=tmp_path)

    def trained(text):
        save_file({"none": torch.zeros(1)}, tmp_path / "judge.safetensors", {"smelt": json.dumps({"method": "x", "text": text})})
        return registry.text(ranking.default_method(here))

    assert registry.text(ranking.default_method(here)) == "pointwise()"
    assert trained("sliding_window(window=4, step=2)") == "sliding_window(window=4, step=2)"
    assert trained("first_token(words=9)") == "sliding_window(judge=first_token(words=9))"  # it reads 26 passages at most
    (tmp_path / "judge.safetensors").write_bytes(b"x")
    with pytest.raises(SmeltError, match=r"judge.safetensors: it does not say which judge"):
        ranking.default_method(here)


def test_an_encoder_embeds():
    encoder = Loaded(tiny("bert"), tiny_tokenizer(), None)
    assert registry.text(ranking.default_method(encoder)) == "embedding()"
    head = AutoModelForSequenceClassification.from_config(encoder.model.config)
    assert registry.text(ranking.default_method(encoder._replace(model=head))) == "pointwise(read='head')"


# files


def test_first_stage_and_method_make_a_run_without_ties(files):
    _, corpus, out = files
    done = rank_files(*files, method=SlidingWindow(Number(), 4, 2), first=Overlap(), top=7)
    texts = {r["_id"]: f"{r['title']} {r['text']}" for r in map(json.loads, corpus.read_text().splitlines())}
    found = orders(out)
    assert list(found) == [f"q{i}" for i in range(12)]
    for i, rows in enumerate(found.values()):
        words = {f"w{i}", f"w{i + 1}"}
        best = sorted(texts, key=lambda d: -len(words & set(texts[d].split())))[:7]  # stable, as the corpus has them
        names = [name for name, *_ in rows]
        assert sorted(names) == sorted(best)
        assert [float(texts[n].split()[0]) for n in names[:2]] == sorted((float(texts[n].split()[0]) for n in best), reverse=True)[:2]
        assert [row[1:] for row in rows] == [(at + 1, 7 - at, "sliding_window") for at in range(7)]
    assert (done.queries, done.passages, done.asked, done.calls, done.chain, done.compared) == (12, 84, 12, 12 * 3, 3, [])
    assert sorted(p.name for p in out.parent.iterdir()) == ["docs.jsonl", "out.trec", "q.tsv"]


def test_a_retriever_searches_directly_and_a_candidate_run_is_reordered(files):
    queries, corpus, out = files
    rank_files(*files, method=Overlap(), top=5, tag="mine")
    first = orders(out)
    assert SEEN.count("index") == 1 and all(tag == "mine" for rows in first.values() for *_, tag in rows)
    again = out.with_name("again.jsonl")
    done = rank_files(queries, corpus, again, method=Overlap(), candidates=out, top=3)
    for line, (query, rows) in zip(map(json.loads, again.read_text().splitlines()), first.items(), strict=True):
        assert line["query"] == query and [p["_id"] for p in line["passages"]] == [name for name, *_ in rows[:3]]
        assert [p["score"] for p in line["passages"]] == sorted((p["score"] for p in line["passages"]), reverse=True)
    assert (done.passages, done.calls, done.chain) == (36, 12, 1)


def test_bm25_is_the_first_stage_that_is_not_said(files):
    queries, corpus, out = files
    rank_files(*files, method=Number(), top=9)
    said, searched = out.read_text(), out.with_name("bm25.trec")
    rank_files(*files, method=Number(), first="bm25()", top=9)
    assert out.read_text() == said
    rank_files(queries, corpus, searched, method="bm25()", top=9)
    names = {q: {name for name, *_ in rows} for q, rows in orders(searched).items()}
    assert names == {q: {name for name, *_ in rows} for q, rows in orders(out).items()} and len(names) == 12


def test_an_embedder_searches_and_reranks(files, small):
    *_, out = files
    rank_files(*files, method="embedding()", model=small, top=30)
    found = orders(out)
    rank_files(*files, method="embedding()", candidates=out.rename(out.with_name("c.trec")), model=small, top=30)
    again = orders(out)
    assert all({r[0] for r in again[q]} == {r[0] for r in rows} and len(rows) == 30 for q, rows in found.items())
    same = [a[0] == b[0] for q in found for a, b in zip(found[q], again[q], strict=True)]
    assert np.mean(same) > 0.9  # a search is the sorted scores, but for the last digit of near ties


def test_a_query_without_candidates_is_counted(files):
    *_, out = files
    (out.with_name("c.trec")).write_text("q3 Q0 d1 1 1 t\nunasked Q0 d1 1 1 t\n")
    done = rank_files(*files, method=Number(), candidates=out.with_name("c.trec"))
    assert list(orders(out)) == ["q3"] and (done.empty, done.passages) == (11, 1)


def test_a_run_that_broke_goes_on_and_asks_nothing_twice(files):
    queries, corpus, out = files
    rank_files(queries, corpus, out.with_name("whole.trec"), method=Number(), first=Overlap(), batch=3)
    whole, everything = out.with_name("whole.trec").read_text(), list(SEEN)
    SEEN.clear()
    BREAKS.append("w7 w8")  # the eighth query, in the third batch
    with pytest.raises(RuntimeError):
        rank_files(*files, method=Number(), first=Overlap(), batch=3)
    journal = out.with_name("out.trec.journal")
    assert not out.exists() and len(journal.read_text().splitlines()) == 12 + 6
    before = [s for s in SEEN if isinstance(s, ranking.Asked)][:6]
    SEEN.clear()
    BREAKS.clear()
    done = rank_files(*files, method=Number(), first=Overlap(), batch=3)
    assert done.asked == len(SEEN) == 6 and "index" not in SEEN  # the search is not repeated either
    assert [*before, *SEEN] == [s for s in everything if isinstance(s, ranking.Asked)]
    assert out.read_text() == whole and not journal.exists()


@pytest.mark.parametrize("change", ["method", "source", "passage", "query", "fresh", "nothing"])
def test_what_changed_is_asked_anew(files, change, monkeypatch):
    queries, corpus, _ = files
    BREAKS.append("w11 w12")
    with pytest.raises(RuntimeError):
        rank_files(*files, method=SlidingWindow(Number()), first=Overlap(), batch=1)
    BREAKS.clear()
    SEEN.clear()
    method = SlidingWindow(Number(), passes=2 if change == "method" else 1)
    if change == "source":
        monkeypatch.setattr(registry, "source_digest", lambda method: "another")
    if change == "passage":
        corpus.write_text(corpus.read_text().replace('"text": "', '"text": "more ', 1))
    if change == "query":
        queries.write_text(queries.read_text().replace("q5\t", "q5\tw5 "))
    done = rank_files(*files, method=method, first=Overlap(), batch=1, fresh=change == "fresh")
    assert done.asked == {"method": 12, "source": 12, "passage": 12, "query": 2, "fresh": 12, "nothing": 1}[change]
    assert ("index" in SEEN) == (change in ("source", "passage", "query", "fresh"))


CHILD = """
    import os, sys, time
    from dataclasses import dataclass
    from pathlib import Path
    from smelt import ranking, registry
    from smelt.rank import Answer, Judge

    @dataclass(frozen=True)
    class Slow(Judge):
        def answers(self, asked, model):
            with open(sys.argv[4], "a") as log:
                log.write("".join(a.query + "\\n" for a in asked))
            time.sleep(0.05)
            return [Answer(sorted(range(len(a.passages)), key=lambda i: a.passages[i]), None) for a in asked]

    registry._NAMES[Slow] = ("rank", "slow")
    ranking.rank_files(*sys.argv[1:4], method=Slow(), candidates=sys.argv[5], batch=2)
"""


@pytest.mark.slow
def test_killed_and_resumed(files):
    queries, _, out = files
    folder = out.parent
    queries.write_text("".join(f"q{i}\tquestion {i}\n" for i in range(60)))
    (folder / "c.trec").write_text("".join(f"q{i} Q0 d{j} {j} {-j} t\n" for i in range(60) for j in range(20)))
    (folder / "child.py").write_text(textwrap.dedent(CHILD))
    command = [sys.executable, "child.py", *map(str, files), "log", "c.trec"]
    journal, killed, deadline = folder / "out.trec.journal", 0, time.monotonic() + 300
    for want in (10, 30, 44):
        process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE)
        while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") >= want):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        process.kill()  # SIGKILL
        process.communicate()
        killed += 1
        assert not out.exists()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    log = (folder / "log").read_text().splitlines()
    assert set(log) == {f"question {i}" for i in range(60)}
    assert len(log) <= 60 + 2 * killed  # only a batch that was being asked when the kill came
    assert len(orders(out)) == 60 and sorted(os.listdir(folder)) == ["c.trec", "child.py", "docs.jsonl", "log", "out.trec", "q.tsv"]


@pytest.mark.slow
def test_500_questions_of_100_passages_killed_seven_times_ask_nothing_twice(tmp_path):
    """The command itself, BM25 over the whole library and a judge that reads 50,000 passages; about five minutes on one core."""
    every = functions()
    (tmp_path / "q.tsv").write_text("".join(f"q{i}\t{every[i].query}\n" for i in range(500)))
    with open(tmp_path / "docs.jsonl", "w") as corpus:
        corpus.writelines(json.dumps({"_id": f"d{i}", "text": f.passage}) + "\n" for i, f in enumerate(every))
    command = [sys.executable, "-m", "smelt", "rank", "--model", "embedded", "--method", "block_rank(length=16)", "--top", "100"]
    command += ["--queries", "q.tsv", "--corpus", "docs.jsonl", "--run", "out.trec"]
    journal, out, before = tmp_path / "out.trec.journal", tmp_path / "out.trec", b""
    for want in (100, 300, 520, 600, 700, 800, 900):  # searches come first, then orders
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= want):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.kill()  # SIGKILL
        process.communicate()
        now = journal.read_bytes()
        now = now[: now.rfind(b"\n") + 1]
        keys = [json.loads(line)["key"] for line in now.splitlines()]
        assert now.startswith(before) and len(now) > len(before) and len(set(keys)) == len(keys) and not out.exists()
        before = now
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    different = len({every[i].query for i in range(500)})  # each was searched for once and ordered once, in all eight processes
    assert f"({2 * different - len(keys)} asked now, the rest known)" in done.stdout and not journal.exists()
    found = orders(out)
    assert len(found) == 500 and all(len(set(names)) == len(names) == 100 for names in ([p for p, *_ in lines] for lines in found.values()))


def test_two_processes_do_not_write_one_run(files):
    lock = FileLock(files[2].with_name(".out.trec.lock"))
    with lock, pytest.raises(SmeltError, match="another process is writing this run"):
        rank_files(*files, method=Number(), first=Overlap())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "name a model or a method"),
        ({"method": "first_tokem()"}, "did you mean 'first_token'"),
        ({"method": Number(), "first": "first_token()"}, "first_token\\(\\) does not search a corpus"),
        ({"method": Number(), "first": Overlap(), "candidates": "c"}, "not from both"),
        ({"method": Number(), "first": Overlap(), "top": 0}, "top=0 should be at least 1"),
        ({"method": Number(), "first": Overlap(), "tag": "two words"}, "must be one word"),
        ({"method": Number(), "candidates": "none.trec"}, "none.trec: cannot be read"),
        ({"method": Number(), "first": Overlap(), "qrels": "none.txt"}, "none.txt: cannot be read"),
        ({"method": Number(), "model": "no/such/model/here"}, "no such folder"),
        ({"method": "sliding_window(judge=first_token())"}, "needs a decoder as its model and was given none"),
        ({"method": Number(), "first": "embedding()"}, "needs a model and was given none"),
        ({"method": "embedding()"}, "needs a model and was given none"),
    ],
)
def test_what_files_are_told(files, options, said):
    with pytest.raises(SmeltError, match=said):
        rank_files(*files, **options)
    assert sorted(os.listdir(files[2].parent)) == ["docs.jsonl", "q.tsv"]


def test_places_that_cannot_be_written_and_inputs_that_would_be_lost(files, tmp_path):
    queries, corpus, out = files
    with pytest.raises(SmeltError, match="this is a folder"):
        rank_files(queries, corpus, tmp_path, method=Number(), first=Overlap())
    with pytest.raises(SmeltError, match="over a file that is read"):
        rank_files(queries, corpus, corpus, method=Number(), first=Overlap())
    with pytest.raises(SmeltError, match="cannot be written"):
        rank_files(queries, corpus, queries / "out.trec", method=Number(), first=Overlap())
    (tmp_path / "c.trec").write_text("other Q0 d1 1 1 t\n")
    with pytest.raises(SmeltError, match=r"c.trec: none of its queries is in .*q.tsv"):
        rank_files(queries, corpus, out, method=Number(), candidates=tmp_path / "c.trec")


def test_a_method_that_breaks_before_its_first_answer_leaves_nothing(files):
    with pytest.raises(SmeltError, match="layer 99 of a model of 8 layers"):
        rank_files(*files, method="embedding(layer=99)", model="embedded")
    assert sorted(os.listdir(files[2].parent)) == ["docs.jsonl", "q.tsv"]


def test_a_search_that_finds_a_passage_twice_is_refused(files, monkeypatch):
    monkeypatch.setattr(Overlap, "search", lambda self, index, queries, k, model: [[(0, 1.0), (0, 1.0)]] * len(queries))
    with pytest.raises(SmeltError, match="Overlap did not find 100 passages or fewer for each query, none of them twice"):
        rank_files(*files, method=Number(), first=Overlap())


def test_ten_thousand_passages_empty_ones_scripts_and_emoji(tmp_path):
    texts = ["", "数学 は 楽しい 🙂", "سلام", "\u200b", *(f"{i} word" for i in range(9996))]
    (tmp_path / "d.tsv").write_text("".join(f"d{i}\t{t}\n" for i, t in enumerate(texts)), encoding="utf-8")
    (tmp_path / "q.tsv").write_text("🙂\t数学 🙂\nempty\t\n", encoding="utf-8")
    done = rank_files(tmp_path / "q.tsv", tmp_path / "d.tsv", tmp_path / "o.trec", method=Overlap(), top=10_000)
    found = [line.split() for line in (tmp_path / "o.trec").read_text(encoding="utf-8").splitlines()]
    assert done.passages == len(found) == 20_000
    assert [row[:3] for row in found[:2]] == [["🙂", "Q0", "d1"], ["🙂", "Q0", "d0"]]
    assert [float(row[4]) for row in found[:10_000]] == list(range(10_000, 0, -1))


def test_a_decoder_reads_them_too(small):
    texts = ["", "数学 は 楽しい 🙂", "سلام", "x " * 500]
    assert sorted(r.place for r in rank(small, "数学 🙂", texts)) == [0, 1, 2, 3]
    assert rank(small, "x", [""])[0].place == 0


# what an order is worth


def slow(grades, judged, relevant=1):
    """nDCG@10, RR@10, Recall@100 of one list of grades, by their definitions."""
    dcg = sum(max(g, 0) / math.log2(i + 2) for i, g in enumerate(grades[:10]))
    ideal = sum(max(g, 0) / math.log2(i + 2) for i, g in enumerate(sorted(judged, reverse=True)[:10]))
    hits = [i for i, g in enumerate(grades) if g >= relevant]
    everything = sum(g >= relevant for g in judged)
    return (
        dcg / ideal if ideal else 0.0,
        1 / (hits[0] + 1) if hits and hits[0] < 10 else 0.0,
        sum(i < 100 for i in hits) / everything if everything else 0.0,
    )


def judgements(seed, queries=20, passages=130):
    """Grades -1 to 3 of some passages, and two runs over others; the last query was not retrieved at all."""
    shuffle = random.Random(seed)
    names = [f"d{i}" for i in range(passages)]
    qrels = {f"q{i}": {n: shuffle.choice([-1, 0, 0, 1, 2, 3]) for n in shuffle.sample(names, 15)} for i in range(queries)}
    runs = {s: {f"q{i}": shuffle.sample(names, shuffle.choice([3, 12, 120])) for i in range(queries - 1)} for s in ("first", "a", "b")}
    return qrels, runs


@pytest.mark.parametrize("relevant", [1, 2])
def test_figures_are_those_of_the_definitions(relevant):
    qrels, runs = judgements(0)
    found = {(c.system, c.measure): c for c in evaluate(qrels, runs, "first", relevant=relevant, draws=50)}
    assert len(found) == 5 * 3
    for system, run in runs.items():
        wanted = [slow([g.get(n, 0) for n in run.get(q, [])], g.values(), relevant) for q, g in qrels.items()]
        for m, measure in enumerate(ranking.MEASURES):
            row = found[system, measure]
            assert row.values == pytest.approx([w[m] for w in wanted], abs=1e-6)
            assert row.value == pytest.approx(np.mean([w[m] for w in wanted]), abs=1e-6)
            assert row.difference == pytest.approx(row.value - found["first", measure].value)
            assert row.values[-1] == 0  # judged, and not in the run


def test_the_oracle_is_the_best_order_and_chance_the_mean_over_all():
    qrels = {"q": {"a": 2, "b": 1, "c": -1, "missing": 3}, "p": {"a": 0, "x": 1}}
    runs = {"first": {"q": list("cdbae"), "p": list("ab")}}
    found = {(c.system, c.measure): c for c in evaluate(qrels, runs, "first", draws=50)}
    for at, (query, judged) in enumerate(qrels.items()):
        every = [slow([judged.get(n, 0) for n in p], judged.values()) for p in itertools.permutations(runs["first"][query])]
        for m, measure in enumerate(ranking.MEASURES):
            assert found[ORACLE, measure].values[at] == pytest.approx(max(w[m] for w in every))
            assert found[CHANCE, measure].values[at] == pytest.approx(np.mean([w[m] for w in every]))
    assert found[ORACLE, "nDCG@10"].value < 1  # the ideal is over all judged passages


def test_chance_of_long_lists_is_the_mean_over_many():
    shuffle, judged = random.Random(0), {f"d{i}": i % 4 // 2 * (i % 3) for i in range(130)}
    names = list(judged)
    mean = np.mean([slow([judged[n] for n in shuffle.sample(names, 130)], judged.values(), 2) for _ in range(4000)], 0)
    assert ranking._by_chance(list(judged.values()), judged, 2) == pytest.approx(mean, abs=0.015)
    assert ranking._by_chance([], judged, 1) == [0, 0, 0] and ranking._by_chance([0, 0], {"a": 0}, 1) == [0, 0, 0]


def test_intervals_and_p_are_those_of_a_slow_loop():
    d = np.random.default_rng(3).normal(0.3, 1.0, (9, 2))
    low, high, p = ranking._resampled(d, 40_000, 0)
    for column in range(2):
        values = d[:, column]
        flips = [abs(np.dot(s, values)) >= abs(values.sum()) - 1e-12 for s in itertools.product([-1, 1], repeat=9)]
        assert p[column] == pytest.approx(np.mean(flips), abs=4 * math.sqrt(0.25 / 40_000))
        draw = random.Random(0)
        means = sorted(np.mean(draw.choices(values, k=9)) for _ in range(20_000))
        assert (low[column], high[column]) == pytest.approx((means[500], means[19_500]), abs=0.03)
    assert (ranking._resampled(np.zeros((4, 1)), 100, 0)[2] == 1).all()  # no difference at all


def test_p_is_uniform_where_there_is_no_difference():
    random_ = np.random.default_rng(0)
    p = ranking._resampled(random_.normal(size=(30, 600)), 2000, 1)[2]
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03) and np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.07)


def test_many_queries_are_drawn_in_parts():
    d = np.random.default_rng(3).normal(0.01, 1.0, (6000, 1))
    low, high, _ = ranking._resampled(d, 2000, 0)
    assert (low[0], high[0]) == pytest.approx((d.mean() - 1.96 / math.sqrt(6000), d.mean() + 1.96 / math.sqrt(6000)), abs=0.003)


def test_holm_over_methods_only():
    assert ranking._holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert ranking._holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])
    qrels, runs = judgements(5, queries=40)
    alone = {s: evaluate(qrels, {"first": runs["first"], s: runs[s]}, "first", draws=500) for s in ("a", "b")}
    both = {(c.system, c.measure): c.p for c in evaluate(qrels, runs, "first", draws=500)}
    for measure in ranking.MEASURES:
        p = {c.system: c.p for rows in alone.values() for c in rows if c.measure == measure}
        assert [both[s, measure] for s in "ab"] == pytest.approx(ranking._holm(np.array([p["a"], p["b"]])))
        assert both[ORACLE, measure] == p[ORACLE] and both[CHANCE, measure] == p[CHANCE] and both["first", measure] == 1


def test_evaluate_is_a_function_of_its_arguments():
    qrels, runs = judgements(2)
    assert evaluate(qrels, runs, "first") == evaluate(qrels, runs, "first")
    with pytest.raises(SmeltError, match="no run 'second'"):
        evaluate(qrels, runs, "second")
    with pytest.raises(SmeltError, match="no judgement"):
        evaluate({}, runs, "first")


def test_a_judged_run_says_what_the_method_gained(files):
    _, corpus, out = files
    texts = {r["_id"]: float(r["title"]) for r in map(json.loads, corpus.read_text().splitlines())}
    out.with_name("qrels.tsv").write_text(
        "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\t{d}\t{int(n >= 50)}\n" for i in range(10) for d, n in texts.items())
    )
    done = rank_files(*files, method=Number(), first=Overlap(), qrels=out.with_name("qrels.tsv"), top=20)
    found = {(c.system, c.measure): c for c in done.compared}
    assert [c.system for c in done.compared[:4]] == ["first stage", "number", ORACLE, CHANCE]
    assert found["number", "nDCG@10"].value == pytest.approx(found[ORACLE, "nDCG@10"].value)
    assert len(found["number", "nDCG@10"].values) == 10 and found["number", "Recall@100"].difference == 0
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(ranking.table(done))
    text = console.export_text()
    assert "oracle" in text and "240 passages, 12 judge calls, longest chain 1" in text and "10 judged queries" in text
    done = rank_files(*files, method=Overlap(), qrels=out.with_name("qrels.tsv"), top=20)
    assert [c.system for c in done.compared[:3]] == ["overlap", ORACLE, CHANCE]


def test_the_figures_of_trec_dl19(shared):
    qrels: dict = {}
    for line in (shared / "rank" / "qrels_dl19.txt").read_text().splitlines():
        query, _, passage, grade = line.split()
        qrels.setdefault(query, {})[passage] = int(grade)
    with gzip.open(shared / "rank" / "dl19_bm25_top100.json.gz", "rt", encoding="utf-8") as lines:
        rows = json.load(lines)
    first = {str(r["hits"][0]["qid"]): [str(h["docid"]) for h in r["hits"]] for r in rows}
    found = {c.system: c for c in evaluate(qrels, {"bm25": first}, "bm25", relevant=2) if c.measure == "nDCG@10"}
    assert found["bm25"].value == pytest.approx(0.5058310, abs=1e-6) and len(found["bm25"].values) == 43
    assert found[ORACLE].value == pytest.approx(0.8922, abs=5e-5)
    shuffle = random.Random(0)
    drawn = [ranking._measured(qrels, {q: shuffle.sample(f, len(f)) for q, f in first.items()}, 2)[:, 0].mean() for _ in range(8)]
    assert found[CHANCE].value == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn, ddof=1) / math.sqrt(8))


def reranking():
    place = Path(__file__).parents[1] / "benchmarks" / "rerank.py"
    spec = importlib.util.spec_from_file_location("rerank_benchmark", place)
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_benchmark_of_trained_rerankers_runs(tmp_path):
    assert reranking().main(["--quick", "--json", str(tmp_path / "found.json")]) == 0
    rows = {line["row"]: line for line in json.loads((tmp_path / "found.json").read_text())["results"]}
    assert [len(line["seeds"]) for line in rows.values()] == [1, 2, 2, 2, 1, 2, 2, 1, 1]
    assert rows["oracle"]["ndcg10"] >= max(line["ndcg10"] for line in rows.values())
    assert rows["BM25"]["difference"] == 0 and rows["BM25"]["p"] is None
    for line in rows.values():
        assert line["ndcg10"] == pytest.approx(np.mean(line["samples"])) and all(len(seed) == 4 for seed in line["samples"])
        assert line["difference"] == pytest.approx(np.mean(line["samples"]) - rows["BM25"]["ndcg10"])


def test_the_benchmark_compares_other_judges_in_a_random_order(tmp_path, capsys):
    words = ["--quick", "--json", str(tmp_path / "found.json"), "--shuffle", "--to", "permutation_text()"]
    assert reranking().main([*words, "--judges", "permutation_text()", "block_rank(order_free=True,aux=1.0,length=16)"]) == 0
    rows = {line["row"]: line for line in json.loads((tmp_path / "found.json").read_text())["results"]}
    assert list(rows)[2:4] == ["permutation_text()", "block_rank(length=16, order_free=True, aux=1.0)"]
    assert rows["permutation_text()"]["difference"] == 0 and rows["BM25"]["p"] is not None
    assert "shown in a random order" in capsys.readouterr().out
    for wrong in (["--judges", "pointwise()"], ["--judges", "permutation_text()", "--tokens", "1", "2"]):
        with pytest.raises(SystemExit):
            reranking().main([*words, *wrong])


def test_the_benchmark_trains_each_judge_as_it_was_said():
    """One recipe for those that train alike, whose warm start is the same in all."""
    made = reranking()
    words = {"length": 8, "passages": 2, "query": 4, "model": "m", "seeds": 1, "lr": 0.1, "precision": "fp32", "warm": 5, "pair_batch": 1}
    judges = ["pointwise()", "first_token()", "block_rank()"]
    alike = argparse.Namespace(**words, batch=1, aux=1.0, judges=judges, tokens=[9], judge_lr=None)
    (one,) = made.recipes(alike, "stdlib()")
    assert all(judge in one for judge in judges) and one.count("tokens: 9") == 1 and one.count("lr: 0.1") == 2
    alike.tokens, alike.judge_lr = [9, 7, 9], [0.3]
    first, second = made.recipes(alike, "stdlib()")
    assert [judge in first for judge in judges] == [True, False, True] and "tokens: 9" in first and "lr: 0.3" in first
    assert "first_token()" in second and "tokens: 7" in second and first.split("rank:")[1] == second.split("rank:")[1]


def test_the_benchmark_measures_the_order_of_the_candidates(tmp_path):
    made = reranking()
    every, found = made.functions(), {q: made.candidates(q, 20)[::-1] for q in made.held_out(6)}
    expected = []
    for q, first in found.items():
        (scores,) = registry.parse("bm25()", "rank").scores([Asked(every[q].query, [every[i].passage for i in first])], None)
        place = 1 + sum(float(s) > float(scores[first.index(q)]) for s in scores) if q in first else 99
        expected.append(1 / math.log2(1 + place) if place <= 10 else 0.0)
    assert made.ordered(None, "bm25()", found, tmp_path / "answers.jsonl") == pytest.approx(expected) and max(expected) > 0


def test_the_benchmark_averages_seeds_before_it_tests():
    first = [[0.1, 0.2, 0.3, 0.4] * 8]
    better = [[v + 0.3 for v in first[0]], [v + 0.1 for v in first[0]]]  # always 0.2 on average
    noise = [[v + (0.1 if i % 2 else -0.1) for i, v in enumerate(first[0])]]
    lines = {
        line["row"]: line
        for line in reranking().compared({"BM25": first, "better": better, "noise": noise, "oracle": [[1.0] * 32]}, "BM25")
    }
    assert [lines["better"][key] for key in ("difference", "low", "high")] == pytest.approx([0.2] * 3)
    assert lines["better"]["spread"] == pytest.approx(0.2 / math.sqrt(2)) and lines["noise"]["spread"] is None
    assert lines["better"]["p"] == pytest.approx(2 / 10_001) and lines["noise"]["p"] > 0.5  # of two tests, so twice the smallest there is
    assert lines["oracle"]["p"] is None
