"""Rerank and embeddings over the wire: equal to direct calls, asked together, one failing request alone, everything odd refused."""

from __future__ import annotations

import asyncio
import base64
import http.client
import importlib.util
import json
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import uvicorn

from smelt import _serve_rank, registry, serve
from smelt._serve_engine import Done, Limits
from smelt._serve_rank import Question, _groups, ranking
from smelt.model._load import Loaded
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.rank import Answer, Asked, Embedder, Judge, Scoring
from smelt.rank._order import ask, order, sort
from smelt.rank._training import FILE, write
from smelt.rank.first_token import FirstToken
from smelt.rank.pointwise import Pointwise
from smelt.rank.sliding_window import SlidingWindow
from smelt.spec import SmeltError

CONTEXT = 2048
MARK = "zwiebelkuchen"


def decoder():
    return tiny("llama", context=CONTEXT)


class Lengths(Scoring):
    """Scores a passage by its length, and by that of the query. `hold` stops it; `bad` passages fail."""

    def __init__(self, hold=None):
        self.hold, self.seen, self.began = hold, [], threading.Event()

    def answers(self, asked, model):
        return sort(self.scores(asked, model))

    def scores(self, asked, model):
        self.seen.append([one.query for one in asked])
        self.began.set()
        if self.hold is not None:
            self.hold.wait(20)
        for one in asked:
            if "bad" in one.passages:
                raise SmeltError("this one is not so")
            if "worse" in one.passages:
                raise ValueError(MARK)
        return [torch.tensor([len(p) + len(one.query) / 100 for p in one.passages], dtype=torch.float64) for one in asked]


class Backwards(Judge):
    """No scores, one order, five passages at most."""

    limit = 5

    def answers(self, asked, model):
        return [Answer(list(range(len(one.passages)))[::-1], None) for one in asked]


class Letters(Embedder):
    """How often a text has each of eight letters; a query the negative of it."""

    def __init__(self):
        self.seen = []

    def embed(self, texts, model, query=False):
        self.seen.append(list(texts))
        if "bad" in texts:
            raise SmeltError("this one is not so")
        counts = [[float(text.count(letter)) for letter in "abcdefgh"] for text in texts]
        return torch.tensor(counts) * (-1 if query else 1)

    def scores(self, asked, model):
        return [self.embed(one.passages, model) @ self.embed([one.query], model, True)[0] for one in asked]

    def answers(self, asked, model):
        return sort(self.scores(asked, model))

    def index(self, passages, model):
        return self.embed(passages, model)

    def search(self, index, queries, k, model):
        raise NotImplementedError


class Client:
    def __init__(self, port):
        self.port = port

    def ask(self, path, body, method="POST"):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            raw = None if body is None else json.dumps(body) if isinstance(body, (dict, list)) else body
            connection.request(method, path, raw, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def open(self, path, body):
        """A socket with the request sent and nothing read."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.sendall(head.encode() + raw)
        return sock


@contextmanager
def inside(model, rank=None, limits=None):
    """A server in a thread of this process."""
    ready = serve.served(model, tiny_tokenizer(context=CONTEXT), "tiny", limits or Limits(), rank=rank)
    listening = serve._listen("127.0.0.1", 0)
    gate = serve.application(ready)
    server = uvicorn.Server(uvicorn.Config(gate, log_config=None, log_level="error", access_log=False, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Client(listening.getsockname()[1]), ready
    finally:
        ready.engine.close()
        server.should_exit = True
        thread.join(60)
        listening.close()


def until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.01)
    return true()


def questions(count, size=7, least=1):
    return [
        (f"what is {i}", [f"def f{i}_{j}(x): return x * {j * (i + 3) % 11}" for j in range(least + (i + size) % size)])
        for i in range(count)
    ]


# equal to direct calls


@pytest.fixture(scope="module")
def listwise():
    with inside(decoder()) as (client, ready):
        yield client, ready


@pytest.mark.parametrize("rank", [None, "sliding_window(window=4, step=2)", "first_token(words=5)"])
def test_scores_are_the_judges_own_or_fall_with_the_place(rank, listwise):
    model, tokenizer = decoder(), tiny_tokenizer(context=CONTEXT)
    loaded = Loaded(model, tokenizer, None)
    method = registry.parse(rank or "pointwise()", "rank")

    def check(client):
        for query, passages in questions(5):
            status, body = client.ask("/v1/rerank", {"query": query, "documents": passages, "model": "tiny"})
            assert status == 200 and set(body) == {"id", "model", "results", "usage"} and body["model"] == "tiny"
            asked, n = [Asked(query, passages)], len(passages)
            if isinstance(method, Judge):
                (answer,) = ask(method, asked, loaded)
                expected = [(i, answer.scores[i].item() if answer.scores is not None else 1.0) for i in answer.order]
            else:
                expected = [(i, (n - place) / n) for place, i in enumerate(order(method, asked, loaded)[0])]
            got = [(result["index"], result["relevance_score"]) for result in body["results"]]
            assert [i for i, _ in got] == [i for i, _ in expected]
            assert [s for _, s in got] == pytest.approx([s for _, s in expected], abs=1e-5)
            tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in [query, *passages])
            assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}

    if rank is None:
        check(listwise[0])
    else:
        with inside(model, rank) as (client, _):
            check(client)


def test_top_n_documents_and_what_is_read_of_them():
    judge = Lengths()
    with inside(decoder(), judge) as (client, _):
        documents = ["one two three", {"text": "ééé \U0001f642 four"}, "", "x"]
        texts = ["one two three", "ééé \U0001f642 four", "", "x"]
        body = {"query": "q", "documents": documents}
        status, full = client.ask("/v1/rerank", body)
        assert status == 200 and [r["index"] for r in full["results"]] == sorted(range(4), key=lambda i: -len(texts[i]))
        assert all(set(r) == {"index", "relevance_score"} for r in full["results"])
        for top in (1, 3, 4, 99):
            _, some = client.ask("/v1/rerank", body | {"top_n": top, "return_documents": True})
            assert [(r["index"], r["relevance_score"]) for r in some["results"]] == [
                (r["index"], r["relevance_score"]) for r in full["results"][:top]
            ]
            assert [r["document"] for r in some["results"]] == [{"text": texts[r["index"]]} for r in some["results"]]
        tokenizer = tiny_tokenizer()
        for most in (1, 2, 3, 50):
            _, cut = client.ask("/v1/rerank", body | {"max_tokens_per_doc": most, "return_documents": True})
            kept = []
            for text in texts:  # the shortest beginning that has the first `most` tokens, whole characters
                ids = tokenizer(text, add_special_tokens=False)["input_ids"][:most]
                made = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
                kept.append(
                    next(text[:end] for end in range(len(text) + 1) if text[:end].encode().startswith(made.rstrip("\ufffd").encode()))
                )
            found = {r["index"]: r["relevance_score"] - 0.01 for r in cut["results"]}
            whole = [len(k) + (i == 1 and most < 50 and found[i] > len(k) + 0.5) for i, k in enumerate(kept)]  # a character begun is kept
            assert [found[i] for i in range(4)] == pytest.approx(whole)
            assert cut["results"][0]["document"]["text"] in texts  # as it was sent
            assert cut["usage"]["total_tokens"] == 1 + sum(
                min(most, len(tokenizer(t, add_special_tokens=False)["input_ids"])) for t in texts
            )


def test_a_judge_with_a_limit_refuses_more_by_name_and_one_without_scores_gives_places():
    with inside(decoder(), Backwards()) as (client, _):
        status, body = client.ask("/v1/rerank", {"query": "q", "documents": ["x"] * 5})
        assert status == 200
        assert [(r["index"], r["relevance_score"]) for r in body["results"]] == [(4 - p, (5 - p) / 5) for p in range(5)]
        status, body = client.ask("/v1/rerank", {"query": "q", "documents": ["x"] * 6})
        assert status == 400 and body["error"]["param"] == "documents" and "at most 5" in body["error"]["message"]


def vectors(body):
    assert [one["index"] for one in body["data"]] == list(range(len(body["data"])))
    return [one["embedding"] for one in body["data"]]


def test_embeddings_are_the_embedders():
    letters = Letters()
    with inside(decoder(), letters) as (client, _):
        texts = ["a bad cafe", "hedge", "abcdefgh"]
        expected = letters.embed(texts, None)
        status, body = client.ask("/v1/embeddings", {"input": texts, "model": "tiny"})
        assert status == 200 and body["object"] == "list" and vectors(body) == expected.tolist()
        tokens = sum(len(tiny_tokenizer()(text)["input_ids"]) for text in texts)
        assert body["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
        assert vectors(client.ask("/v1/embeddings", {"input": texts[1]})[1]) == [expected[1].tolist()]
        assert vectors(client.ask("/v1/embeddings", {"input": texts, "input_type": "query"})[1]) == (-expected).tolist()
        _, body = client.ask("/v1/embeddings", {"input": texts, "encoding_format": "base64"})
        assert [list(struct.unpack("<8f", base64.b64decode(one))) for one in vectors(body)] == expected.tolist()
        _, body = client.ask("/v1/embeddings", {"input": texts, "dimensions": 3})
        for found, row in zip(vectors(body), expected.tolist()):
            size = sum(x * x for x in row[:3]) ** 0.5 or 1.0
            assert found == pytest.approx([x / size for x in row[:3]])
        assert vectors(client.ask("/v1/embeddings", {"input": texts, "dimensions": 8})[1]) == expected.tolist()
        status, body = client.ask("/v1/embeddings", {"input": texts, "dimensions": 9})
        assert status == 400 and body["error"]["param"] == "dimensions"
        _, body = client.ask("/v1/rerank", {"query": "ab", "documents": texts})  # an embedder is a judge too
        assert [r["index"] for r in body["results"]] == sort(letters.scores([Asked("ab", texts)], None))[0].order


@pytest.mark.skipif("embedding" not in registry.names("rank"), reason="rank/embedding.py is not there")
@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_where_nothing_is_bound_embedding_embeds(architecture):
    model = tiny(architecture, context=CONTEXT)
    loaded, texts = Loaded(model, tiny_tokenizer(context=CONTEXT), None), ["def f(x):", "import os", "é"]
    expected = registry.parse("embedding()", "rank").embed(texts, loaded)
    with inside(model) as (client, _):
        status, body = client.ask("/v1/embeddings", {"input": texts})
        assert status == 200, body
        assert torch.allclose(torch.tensor(vectors(body)), expected, atol=1e-5)
        status, body = client.ask("/v1/rerank", {"query": "f", "documents": texts})
        assert status == 200 and sorted(r["index"] for r in body["results"]) == [0, 1, 2]


def test_the_openai_client():
    openai = pytest.importorskip("openai")
    letters = Letters()
    with inside(decoder(), letters) as (client, _):
        with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", max_retries=0) as ai:
            texts = ["cafe", "deed"]
            found = ai.embeddings.create(model="tiny", input=texts)  # asks for base64 by itself
            assert [one.embedding for one in found.data] == letters.embed(texts, None).tolist()
            found = ai.embeddings.create(model="tiny", input="cafe", encoding_format="float", dimensions=8, user="x")
            assert found.data[0].embedding == letters.embed(["cafe"], None)[0].tolist() and found.usage.total_tokens > 0
            with pytest.raises(openai.BadRequestError):
                ai.embeddings.create(model="tiny", input=[])
            with pytest.raises(openai.NotFoundError):
                ai.embeddings.create(model="text-embedding-3-small", input="x")


# together


def together(client, path, bodies):
    """The answers to all, asked by a thread each."""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: client.ask(path, body), bodies))


def test_64_clients_at_once_get_their_own_answers_in_few_calls():
    judge, asked = Lengths(), questions(64, least=2)  # a passage alone is not judged
    with inside(decoder(), judge, Limits(batch=16)) as (client, ready):
        judge.seen.clear()
        hold = judge.hold = threading.Event()
        threading.Thread(target=lambda: (until(lambda: ready.engine.waiting + len(ready.engine.running) == 64), hold.set())).start()
        answers = together(client, "/v1/rerank", [{"query": q, "documents": d} for q, d in asked])
        sizes = [len(call) for call in judge.seen]
        assert sum(sizes) == 64 and max(sizes) == 16 and len(sizes) <= 5  # those that wait behind the first call, 16 at a time
    for (query, documents), (status, body) in zip(asked, answers):
        scores = [len(d) + len(query) / 100 for d in documents]
        expected = sorted(range(len(documents)), key=lambda i: -scores[i])
        assert status == 200
        assert [(r["index"], r["relevance_score"]) for r in body["results"]] == [(i, scores[i]) for i in expected]


def test_windows_of_requests_that_wait_are_read_together(listwise):
    client, ready = listwise
    asked, loaded = questions(12, size=9), ready.ranking.loaded
    alone = [order(ready.ranking.method, [Asked(*one)], loaded)[0] for one in asked]
    answers = together(client, "/v1/rerank", [{"query": q, "documents": d} for q, d in asked])
    assert [[r["index"] for r in body["results"]] for _, body in answers] == alone


def test_embeddings_and_reranks_wait_in_one_queue_and_join_their_own_kind():
    letters = Letters()
    with inside(decoder(), letters) as (client, ready):
        letters.seen.clear()
        gate, hold = letters.embed, threading.Event()
        letters.embed = lambda *given, **more: (hold.wait(20), gate(*given, **more))[1]
        threading.Thread(target=lambda: (until(lambda: ready.engine.waiting + len(ready.engine.running) == 11), hold.set())).start()
        bodies = [{"input": [f"{letter}{i}" for i in range(2)]} for letter in "abcdefgh"] + [{"input": "ab", "input_type": "query"}] * 3
        answers = together(client, "/v1/embeddings", bodies)
    for body, (status, answer) in zip(bodies, answers):
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        assert status == 200 and vectors(answer) == gate(texts, None, query="input_type" in body).tolist()
    assert len(letters.seen) - len(bodies) <= 3


def test_one_that_fails_fails_alone(caplog):
    judge = Lengths()
    with inside(decoder(), judge) as (client, ready):
        hold = judge.hold = threading.Event()
        bodies = [{"query": f"q{i}", "documents": [f"x{i}", "yyyy", *more]} for i, more in enumerate([[], ["bad"], [], ["worse"], []])]
        threading.Thread(target=lambda: (until(lambda: ready.engine.waiting == 5), hold.set())).start()
        first = client.open("/v1/rerank", bodies[0])
        judge.began.wait(10)
        answers = together(client, "/v1/rerank", bodies)
        first.close()
    assert [status for status, _ in answers] == [200, 400, 200, 500, 200]
    assert answers[1][1]["error"]["message"] == "this one is not so" and answers[3][1]["error"]["type"] == "server_error"
    assert MARK not in json.dumps(answers) and MARK not in caplog.text and "ValueError" in caplog.text
    for i in (0, 2, 4):
        assert [r["index"] for r in answers[i][1]["results"]] == [1, 0]


def test_a_cut_connection_is_never_asked_about():
    judge = Lengths()
    with inside(decoder(), judge) as (client, ready):
        hold = judge.hold = threading.Event()
        judge.began.clear()
        first = client.open("/v1/rerank", {"query": "first", "documents": ["a", "bb"]})
        judge.began.wait(10)
        gone = client.open("/v1/rerank", {"query": "gone", "documents": ["a", "bb"]})
        assert until(lambda: ready.engine.waiting == 1)
        gone.close()
        assert until(lambda: ready.engine.waiting == 0)
        hold.set()
        assert client.ask("/v1/rerank", {"query": "last", "documents": ["a", "bb"]})[0] == 200
        assert not any("gone" in call for call in judge.seen)
        first.close()


class Endless(Backwards):
    """Reads the model until somebody stops it."""

    def __init__(self):
        self.reads = 0

    def answers(self, asked, model):
        while asked[0].query != "a":  # the words it is tried on
            self.reads += 1
            model.model(input_ids=torch.ones(1, 4, dtype=torch.long), use_cache=False)
            time.sleep(0.001)
        return super().answers(asked, model)


@pytest.mark.parametrize("end", ["time", "cut"])
def test_a_question_nobody_waits_for_ends_at_the_next_forward(end):
    judge = Endless()
    with inside(decoder(), judge, Limits(seconds=0.4 if end == "time" else 60.0)) as (client, ready):
        body = {"query": "q", "documents": ["a", "b"]}
        if end == "time":
            status, said = client.ask("/v1/rerank", body)
            assert status == 504 and said["error"]["code"] == "timeout"
        else:
            sock = client.open("/v1/rerank", body)
            assert until(lambda: judge.reads > 2)
            sock.close()
        assert until(lambda: not ready.engine.running, 3)
        assert client.ask("/v1/rerank", {"query": "a", "documents": ["a", "b"]})[0] == 200


def test_one_given_up_while_others_of_its_run_are_asked_is_left_out():
    async def main():
        seen, model = [], decoder()

        def answer(asked):
            seen.append(list(asked))
            return [what.upper() for what in asked]

        jobs = [Question(answer, what, 1, 10.0) for what in "abc"]
        jobs[1].over = True
        jobs[0].run(model, jobs, lambda left: [])
        assert seen == [["a", "c"]] and not model.get_input_embeddings()._forward_pre_hooks
        for job, said in ((jobs[0], "A"), (jobs[2], "C")):
            assert await job.event() == said and await job.event() == Done("stop", 1, 0)
        jobs[0].run(model, jobs, lambda left: [])  # all are over
        assert len(seen) == 1

    asyncio.run(main())


@pytest.mark.parametrize("sizes", [[1], [9, 9], [3, 3, 3, 3, 3], [1, 8, 8, 1, 20, 1, 1]])
def test_groups_keep_the_order_and_the_budget(sizes, monkeypatch):
    monkeypatch.setattr(_serve_rank, "TOGETHER", 10)
    jobs = [SimpleNamespace(tokens=size, at=at) for at, size in enumerate(sizes)]
    groups = list(_groups(jobs))
    assert [job.at for group in groups for job in group] == list(range(len(sizes)))
    assert all(len(group) == 1 or sum(job.tokens for job in group) <= 10 for group in groups)
    for one, following in pairwise(groups):  # none is split without need
        assert sum(job.tokens for job in one) + following[0].tokens > 10


# refusals

RERANK = {"query": "q", "documents": ["a", "b"]}
EMBED = {"input": "a"}
WRONG = [
    ("rerank", "{", None),
    ("rerank", [1], None),
    ("rerank", {}, "query"),
    ("rerank", {"query": "q"}, "documents"),
    ("rerank", RERANK | {"query": ""}, "query"),
    ("rerank", RERANK | {"query": 5}, "query"),
    ("rerank", RERANK | {"query": "\ud800"}, "query"),
    ("rerank", RERANK | {"documents": []}, "documents"),
    ("rerank", RERANK | {"documents": "a"}, "documents"),
    ("rerank", RERANK | {"documents": {"a": "b"}}, "documents"),
    ("rerank", RERANK | {"documents": ["a", 1]}, "documents.1"),
    ("rerank", RERANK | {"documents": ["a", None]}, "documents.1"),
    ("rerank", RERANK | {"documents": [{"text": "a", "title": "b"}]}, "documents.0"),
    ("rerank", RERANK | {"documents": [{"body": "a"}]}, "documents.0"),
    ("rerank", RERANK | {"documents": ["a", "\ud800"]}, None),
    ("rerank", RERANK | {"documents": ["a"] * (_serve_rank.DOCUMENTS + 1)}, "documents"),
    ("rerank", RERANK | {"top_n": 0}, "top_n"),
    ("rerank", RERANK | {"top_n": "2"}, "top_n"),
    ("rerank", RERANK | {"top_n": True}, "top_n"),
    ("rerank", RERANK | {"max_tokens_per_doc": 0}, "max_tokens_per_doc"),
    ("rerank", RERANK | {"return_documents": 1}, "return_documents"),
    ("rerank", RERANK | {"model": 3}, "model"),
    ("rerank", RERANK | {"max_chunks_per_doc": 3}, None),
    ("rerank", RERANK | {"rank_fields": ["title"]}, None),
    ("rerank", RERANK | {"bogus": 1}, "bogus"),
    ("embeddings", {}, "input"),
    ("embeddings", EMBED | {"input": ""}, "input"),
    ("embeddings", EMBED | {"input": []}, "input"),
    ("embeddings", EMBED | {"input": ["a", ""]}, "input"),
    ("embeddings", EMBED | {"input": [1, 2]}, "input"),
    ("embeddings", EMBED | {"input": [[1, 2]]}, "input"),
    ("embeddings", EMBED | {"input": {"a": 1}}, "input"),
    ("embeddings", EMBED | {"input": "\ud800"}, "input"),
    ("embeddings", EMBED | {"input": ["a"] * (_serve_rank.INPUTS + 1)}, "input"),
    ("embeddings", EMBED | {"input": "x " * (CONTEXT + 1)}, "input"),
    ("embeddings", EMBED | {"encoding_format": "hex"}, "encoding_format"),
    ("embeddings", EMBED | {"dimensions": 0}, "dimensions"),
    ("embeddings", EMBED | {"dimensions": 2.5}, "dimensions"),
    ("embeddings", EMBED | {"input_type": "search"}, "input_type"),
    ("embeddings", EMBED | {"bogus": 1}, "bogus"),
]


@pytest.fixture(scope="module")
def lettered():
    with inside(decoder(), Letters()) as (client, _):
        yield client


@pytest.mark.parametrize("path, body, param", WRONG, ids=range(len(WRONG)))
def test_wrong_bodies_are_refused_in_openais_shape(lettered, path, body, param):
    status, answer = lettered.ask(f"/v1/{path}", body)
    assert status == 400 and set(answer["error"]) == {"message", "type", "param", "code"}, answer
    assert answer["error"]["type"] == "invalid_request_error" and len(answer["error"]["message"].splitlines()) == 1
    if param:
        assert str(answer["error"]["param"]).startswith(param)


@pytest.mark.parametrize("ids", [[1, 2], [[1, 2], [3]]])
def test_token_ids_are_refused_by_name(lettered, ids):
    status, answer = lettered.ask("/v1/embeddings", {"input": ids})
    assert status == 400 and "token ids are not supported" in answer["error"]["message"] and answer["error"]["param"] == "input"


def test_fields_that_change_nothing_are_taken_and_another_model_is_404(lettered):
    free = {"user": "me", "rank_fields": ["text"], "truncation": True, "max_chunks_per_doc": None, "top_n": None}
    assert lettered.ask("/v1/rerank", RERANK | free)[0] == 200
    assert lettered.ask("/v1/embeddings", EMBED | {"user": "me", "dimensions": None})[0] == 200
    for path, body in (("rerank", RERANK), ("embeddings", EMBED)):
        status, answer = lettered.ask(f"/v1/{path}", body | {"model": "other"})
        assert status == 404 and answer["error"]["code"] == "model_not_found"
        assert lettered.ask(f"/v1/{path}", None, "GET")[0] == 405


def test_a_full_queue_and_a_stopping_server():
    judge = Lengths()
    with inside(decoder(), judge, Limits(queue=1)) as (client, ready):
        hold = judge.hold = threading.Event()
        socks = [client.open("/v1/rerank", RERANK)]
        assert until(lambda: ready.engine.running)
        socks.append(client.open("/v1/rerank", RERANK))
        assert until(lambda: ready.engine.waiting == 1)
        status, body = client.ask("/v1/rerank", RERANK)
        assert status == 429 and body["error"]["code"] == "queue_full"
        hold.set()
        assert until(lambda: not ready.engine.running and not ready.engine.waiting)
        ready.engine.stopping = True
        for path, body in (("rerank", RERANK), ("embeddings", EMBED)):
            assert client.ask(f"/v1/{path}", body)[0] == 503
        for sock in socks:
            sock.close()


def test_an_encoder_ranks_and_embeds_and_writes_nothing():
    model = tiny("bert", context=CONTEXT)
    with inside(model, Letters()) as (client, _):
        assert client.ask("/v1/rerank", RERANK)[0] == 200
        assert client.ask("/v1/embeddings", EMBED)[0] == 200
        for path in ("completions", "chat/completions"):
            for body in ({"model": "tiny", "prompt": "x"}, {}):
                status, answer = client.ask(f"/v1/{path}", body)
                assert status == 400 and answer["error"]["code"] == "unsupported"
                assert "BertModel has no language head" in answer["error"]["message"]
        assert client.ask("/v1/models", None, "GET")[1]["data"][0]["id"] == "tiny"
        assert client.ask("/health", None, "GET")[0] == 200


# which method


def test_the_default_the_one_named_and_a_trained_judges_own(tmp_path):
    loaded = Loaded(decoder(), tiny_tokenizer(), tmp_path)
    assert ranking(loaded).method == Pointwise()
    assert ranking(loaded, "first_token(words=3)").method == FirstToken(words=3)
    assert ranking(loaded).loaded.tokenizer is not loaded.tokenizer  # the engine's thread has its own
    (tmp_path / "config.json").write_text("{}")
    write(FirstToken(words=9), None, tmp_path)
    assert ranking(loaded).method == SlidingWindow(judge=FirstToken(words=9), window=20, step=10)
    assert ranking(loaded, "first_token(words=3)").method == FirstToken(words=3)
    (tmp_path / FILE).write_bytes(b"nothing")
    with pytest.raises(SmeltError, match="does not say which judge"):
        ranking(loaded)
    assert ranking(loaded, "first_token()").method == FirstToken()


@pytest.mark.parametrize(
    "rank, message",
    [("frist_token()", "first_token"), ("[first_token(), first_token()]", "does not rank"), ("first_token(words=0)", "words")],
)
def test_a_wrong_method_is_one_line_before_weights_are_read(rank, message):
    with pytest.raises(SmeltError, match=message):
        ranking(Loaded(decoder(), tiny_tokenizer(), None), rank)
    if rank == "frist_token()":
        with pytest.raises(SmeltError, match=message):
            serve.serve("/no/such/folder", rank=rank, port=0)


def test_a_method_that_cannot_work_with_the_model_is_refused_at_the_start():
    with pytest.raises(SmeltError, match="first_token needs a decoder"):
        serve.served(tiny("bert"), tiny_tokenizer(), "x", rank="first_token()")


def test_an_encoder_that_cannot_embed_either_is_refused(monkeypatch):
    monkeypatch.setattr(_serve_rank, "default_method", lambda loaded: FirstToken())
    with pytest.raises(SmeltError, match="BertModel has no language head, so it can only rank and embed, and does not: first_token needs"):
        serve.served(tiny("bert"), tiny_tokenizer(), "x")


def test_the_benchmark_runs():
    place = Path(__file__).parents[1] / "benchmarks" / "serve_rerank.py"
    spec = importlib.util.spec_from_file_location("serve_rerank", place)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    assert benchmark.main(["--quick"]) == 0
