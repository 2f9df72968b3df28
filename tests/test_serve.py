"""The server: texts in pieces, the queue, answers equal to plain generation, and the whole of it under bad and heavy use."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import uvicorn

from smelt import serve
from smelt._serve_engine import Done, Engine, Failed, Job, Limits, Refused
from smelt._serve_flight import fly, rule
from smelt._serve_write import Choice, Growing, Writing
from smelt.attention._mixer import convert, place
from smelt.attention.mohawk import Mohawk
from smelt.model import _load
from smelt.model._tiny import tiny, tiny_tokenizer
from smelt.spec import SmeltError

CONTEXT = 4096
TOKEN = "sesame-4711"
MARK = "zwiebelkuchen"  # in every prompt; must not turn up in a log


def long_model():
    """No end of text, and a context in which an answer takes seconds."""
    model = tiny("llama", context=CONTEXT, eos_token_id=None)
    model.generation_config.eos_token_id = None
    return model


# texts


def reference(tokenizer, ids, stops):
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text[: min([at for stop in stops if (at := text.find(stop)) >= 0], default=len(text))]


@pytest.mark.parametrize("seed", range(30))
def test_pieces_join_to_the_text_before_the_first_stop_string(seed):
    draw, tokenizer = random.Random(seed), tiny_tokenizer()
    ids = tokenizer("name é x 数学\U0001f642 in os.listdir\n")["input_ids"] + [draw.randrange(2, 320) for _ in range(60)]
    whole = reference(tokenizer, ids, [])
    stops = [whole[at : at + draw.randint(1, 5)] for at in (draw.randrange(len(whole) - 5) for _ in range(draw.randint(0, 3)))]
    stops = [stop for stop in stops if "\ufffd" not in stop]
    expected, growing, said = reference(tokenizer, ids, stops), Growing(tokenizer, stops), ""
    for token in ids:
        growing.put(token)
        said += growing.ready()
        assert expected.startswith(said)
        if growing.stopped:
            break
    said += growing.ready(last=True)
    assert said == expected
    assert growing.stopped == (expected != whole)


def test_half_a_character_waits_and_half_a_stop_string_too():
    tokenizer = tiny_tokenizer()
    growing = Growing(tokenizer, ["END"])
    for token in tokenizer("数", add_special_tokens=False)["input_ids"][:-1]:
        growing.put(token)
        assert growing.ready() == ""
    growing.put(tokenizer("数", add_special_tokens=False)["input_ids"][-1])
    assert growing.ready() == "数"
    for letter, sent in (("E", ""), ("N", ""), ("X", "ENX")):
        growing.put(tokenizer(letter, add_special_tokens=False)["input_ids"][0])
        assert growing.ready() == sent


# the queue


class Note(Job):
    def __init__(self, label, ran, together=None, hold=None, error=None):
        super().__init__(30.0, together)
        self.label, self.ran, self.hold, self.error = label, ran, hold, error

    def run(self, model, jobs, join):
        if self.hold is not None:
            self.hold.wait(10)
        self.ran.append([job.label for job in jobs])
        if self.error is not None:
            raise self.error
        for job in jobs:
            job.deliver(Done("stop", 0, 0))


def test_the_queue_keeps_its_order_joins_equals_and_is_bounded():
    async def main():
        engine, ran, hold = Engine(None, Limits(queue=5, batch=3)), [], threading.Event()
        first = Note("first", ran, hold=hold)
        engine.submit(first)
        while not engine.running:
            await asyncio.sleep(0.01)
        jobs = [Note("a", ran, 1), Note("b", ran, 2), Note("c", ran, 1), Note("d", ran), Note("e", ran)]
        for job in jobs:
            engine.submit(job)
        with pytest.raises(Refused) as full:
            engine.submit(Note("f", ran))
        assert full.value.status == 429 and int(full.value.headers["Retry-After"]) >= 1
        engine.give_up(jobs[3])
        late = Note("f", ran, 1)
        engine.submit(late)  # there is room again
        hold.set()
        for job in (first, *jobs[:3], jobs[4], late):
            assert await job.event() == Done("stop", 0, 0)
        engine.close()
        assert not engine.alive
        with pytest.raises(Refused, match="stopping"):
            engine.submit(Note("g", ran))
        assert ran == [["first"], ["a", "c", "f"], ["b"], ["e"]]

    asyncio.run(main())


def test_the_time_to_wait_is_told_by_the_job_and_not_by_the_run():
    """A run that others join may go on for hours."""

    async def main():
        engine, ran, hold = Engine(None, Limits(batch=3)), [], threading.Event()
        engine.submit(Note("gate", ran, hold=hold))
        while not engine.running:
            await asyncio.sleep(0.01)
        slow = threading.Event()
        jobs = [Note(label, ran, 1, hold=slow) for label in "abc"]
        for job in jobs:
            engine.submit(job)
        hold.set()
        while engine.running[:1] != jobs[:1]:
            await asyncio.sleep(0.01)
        before = engine._pace
        await asyncio.sleep(before)
        slow.set()
        while engine.running:
            await asyncio.sleep(0.01)
        assert engine._pace < before  # three jobs took little more than one was thought to take
        engine.close()

    asyncio.run(main())


def test_a_failing_job_tells_its_kind_and_the_next_one_runs(caplog):
    async def main():
        engine, ran = Engine(None, Limits()), []
        for error, status in ((ValueError(MARK), 500), (SmeltError("not so"), 400)):
            job = Note("x", ran, error=error)
            engine.submit(job)
            with pytest.raises(Refused) as told:
                await job.event()
            assert told.value.status == status and MARK not in told.value.message
        fine = Note("y", ran)
        engine.submit(fine)
        assert await fine.event() == Done("stop", 0, 0)
        engine.close()

    asyncio.run(main())
    assert MARK not in caplog.text and "ValueError" in caplog.text


def test_closing_fails_what_runs_and_waits():
    async def main():
        engine, ran, hold = Engine(None, Limits()), [], threading.Event()
        jobs = [Note("a", ran, hold=hold), Note("b", ran)]
        for job in jobs:
            engine.submit(job)
        await asyncio.to_thread(engine.close, 0.2)
        hold.set()
        for job in jobs:
            with pytest.raises(Refused, match="stopping"):
                await job.event()

    asyncio.run(main())


# answers


def written(model, asked, alone=False, gap=None):
    """(text, end) of each (ids, most, choice, stops); all are in the queue before the first one runs."""
    ran, tokenizer = [], tiny_tokenizer()

    async def main():
        engine, hold = Engine(model, Limits()), threading.Event()
        engine.submit(Note("gate", ran, hold=hold))
        jobs = [Writing(tokenizer, ids, most, choice, stops, 60.0, alone) for ids, most, choice, stops in asked]
        for job in jobs:
            engine.submit(job)
        hold.set()
        answers = []
        for job in jobs:
            pieces = []
            while not isinstance(event := await job.event(), (Done, Failed)):
                pieces.append(event)
            answers.append(("".join(pieces), event))
        engine.close()
        return answers

    return asyncio.run(main())


def prompts(count, seed=0):
    draw = random.Random(seed)
    return [[draw.randrange(2, 300) for _ in range(draw.randint(1, 30))] for _ in range(count)]


def plain(model, ids, most):
    made = model.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=most, do_sample=False, pad_token_id=1
    )
    return made[0, len(ids) :].tolist()


@pytest.mark.parametrize("ends", [[], list(range(2, 60))])
def test_greedy_answers_in_company_are_those_of_plain_generate(model, ends):
    model.generation_config.eos_token_id = ends or None
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    asked = [(ids, 5 + 3 * i, Choice(0.0), []) for i, ids in enumerate(prompts(8))]
    answers = written(model, asked)
    together = len(calls)
    handle.remove()
    for (ids, most, _, _), (text, end) in zip(asked, answers):
        made = plain(model, ids, most)
        ended = bool(made) and made[-1] in ends
        assert text == reference(tiny_tokenizer(), made, [])
        assert end == Done("stop" if ended else "length", len(ids), len(made))
    assert together <= max(most for _, most, _, _ in asked)  # one call per token of the longest, for all eight


@pytest.mark.parametrize("decode", [None, "prompt_lookup(tokens=4)"])
def test_stop_strings_end_an_answer_at_the_same_token_with_and_without_drafts(decode):
    from smelt.runtime import bind

    model, tokenizer = long_model(), tiny_tokenizer()
    for ids in prompts(4, seed=3):
        made = plain(model, ids, 40)
        whole = reference(tokenizer, made, [])
        stop = next(whole[at : at + 2] for at in range(len(whole) // 2, len(whole) - 2) if "\ufffd" not in whole[at : at + 2])
        needed = next(n for n in range(1, 41) if stop in reference(tokenizer, made[:n], []))
        with bind(model, decode=decode, tokenizer=tokenizer):
            ((text, end),) = written(model, [(ids, 40, Choice(0.0), [stop])], alone=True)
        assert text == whole[: whole.index(stop)]
        assert end.reason == "stop" and needed <= end.made <= needed + 3  # a character is known when its last byte is


def test_a_seed_gives_the_same_answer_alone_and_in_company():
    model, ids = long_model(), prompts(1)[0]
    seeded = (ids, 20, Choice(1.0, 0.9, seed=7), [])
    ((alone, _),) = written(model, [seeded])
    company = written(model, [(ids, 20, Choice(1.0, 0.9), []), seeded, (ids, 20, Choice(1.0, 0.9, seed=8), []), seeded])
    assert company[1][0] == company[3][0] == alone
    assert len({company[0][0], alone, company[2][0]}) == 3


def test_sampling_has_the_models_whole_distribution():
    """Not the 50 likeliest tokens, which is what transformers would take by itself."""
    model, ids = long_model(), prompts(1)[0]
    with torch.no_grad():
        law = model(torch.tensor([ids])).logits[0, -1].softmax(-1)
    outside = float(1 - law.topk(50).values.sum())
    assert outside > 0.1
    seen = []
    put = Writing.put
    Writing.put = lambda self, token, ends: (seen.append(token), put(self, token, ends))[1]
    try:
        written(model, [(ids, 1, Choice(1.0, 1.0), []) for _ in range(120)])
    finally:
        Writing.put = put
    top = set(law.topk(50).indices.tolist())
    drawn = sum(token not in top for token in seen)
    assert len(seen) == 120 and abs(drawn - 120 * outside) < 4 * (120 * outside * (1 - outside)) ** 0.5 and drawn


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mistral", "state"])
def test_answers_that_come_later_join_and_are_those_of_plain_generate(architecture):
    """Longer and shorter prompts, some of whose rows leave before others join. Windows and states have no rows to widen: they wait."""
    window = {"sliding_window": 8} if architecture == "mistral" else {}
    model, lengths = tiny("llama" if architecture == "state" else architecture, eos_token_id=None, **window), []
    if architecture == "state":
        place(model, convert(model, Mohawk(state=8)))
    model.generation_config.eos_token_id = None
    asked = [(ids, 6 + 5 * (i % 4)) for i, ids in enumerate(prompts(9, seed=5))]
    coming = [Written(ids, most) for ids, most in asked]
    later = [coming[3:5], [], coming[5:6], coming[6:], []]

    def join(left):
        return later.pop(0) if later and len(lengths) % 3 == 0 else []

    handle = model.register_forward_pre_hook(lambda *_: lengths.append(1))
    fly(model, coming[:3], lambda choice: ([], False), frozenset(), join)
    handle.remove()
    made = 9 if architecture in ("llama", "qwen2") else 3
    assert all(one.over for one in coming[:made]) and not any(one.over for one in coming[made:])
    for one, (ids, most) in zip(coming[:made], asked):
        assert one.tokens == plain(model, ids, most)


class Written:
    """An answer without a text."""

    def __init__(self, ids, most):
        self.ids, self.most, self.tokens, self.over, self.choice = ids, most, [], False, None

    def put(self, token, ends):
        assert not self.over
        self.tokens.append(token)
        self.over = token in ends or len(self.tokens) >= self.most


def test_a_short_answer_does_not_wait_for_a_long_one_and_another_kind_of_job_waits_for_neither():
    """The queue: a long answer runs; two short ones come and join it. Behind them is another kind, behind which none joins."""
    model, ran = long_model(), []

    async def main():
        engine = Engine(model, Limits(batch=4))

        def ask(most):
            job = Writing(tiny_tokenizer(), prompts(1)[0], most, Choice(0.0), [], 60.0, False)
            engine.submit(job)
            return job

        async def end(job):
            while not isinstance(event := await job.event(), Done):
                pass
            return event

        long = ask(4000)
        await long.event()
        short = [ask(5), ask(9)]
        note = Note("other", ran)
        engine.submit(note)
        last = ask(4)
        for job in short:
            assert (await end(job)).made == job.most
        assert not long.over and not ran and last not in engine.running
        engine.give_up(long)
        await end(note)
        assert ran == [["other"]] and (await end(last)).made == 4
        engine.close()

    asyncio.run(main())


def test_drawn_and_greedy_answers_share_a_batch_each_by_its_own_rule():
    model, ids = long_model(), prompts(1)[0]
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    answers = written(model, [(ids, 20, Choice(heat, seed=seed), []) for heat, seed in ((0.0, None), (1.0, None), (1e-5, None), (0.0, 7))])
    handle.remove()
    texts = [text for text, _ in answers]
    assert texts[0] == texts[2] == texts[3] == reference(tiny_tokenizer(), plain(model, ids, 20), []) != texts[1]
    assert len(calls) == 20


def test_processors_that_look_at_the_text_keep_rows_together():
    model = long_model()
    assert rule(model, Choice(0.0).options()) == ([], False)
    processors, sample = rule(model, Choice(0.5, 0.9).options())
    assert sample and [type(p).__name__ for p in processors] == ["TemperatureLogitsWarper", "TopPLogitsWarper"]
    model.generation_config.repetition_penalty = 1.3
    assert rule(model, Choice(0.0).options()) is None
    ids = prompts(2)
    for (text, _), one in zip(written(model, [(one, 12, Choice(0.0), []) for one in ids]), ids):
        assert text == reference(tiny_tokenizer(), plain(model, one, 12), [])


def test_a_given_up_answer_ends_at_the_next_token():
    model, calls = long_model(), []

    async def main():
        engine = Engine(model, Limits())
        job = Writing(tiny_tokenizer(), prompts(1)[0], 4000, Choice(0.0), [], 60.0, False)
        engine.submit(job)
        await job.event()
        engine.give_up(job)
        at = len(calls)
        while engine.running:
            await asyncio.sleep(0.01)
        assert len(calls) <= at + 2
        engine.close()

    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    asyncio.run(main())
    handle.remove()


# the token


def test_the_token_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.TOKEN, raising=False)
    assert serve.token() is None
    monkeypatch.setenv(serve.TOKEN, "outside")
    assert serve.token() == b"outside"
    (tmp_path / "token").write_text("inside\nsecond line\n")
    assert serve.token(tmp_path / "token") == b"inside"
    for wrong in ("", " \n", "two words", "ümlaut"):
        (tmp_path / "token").write_text(wrong, encoding="utf-8")
        with pytest.raises(SmeltError, match="no token"):
            serve.token(tmp_path / "token")
    with pytest.raises(SmeltError, match="cannot be read"):
        serve.token(tmp_path / "nothing")


def test_a_model_without_a_language_head_ranks_only():
    with pytest.raises(SmeltError, match="needs a decoder"):
        serve.served(tiny("bert"), tiny_tokenizer(), "x", rank="first_token()")


# over the wire


class Client:
    def __init__(self, port, token=None):
        self.port, self.headers = port, {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})

    def ask(self, method, path, body=None, headers=None):
        """(status, decoded JSON, headers)"""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = json.dumps(body) if isinstance(body, dict) else body
            connection.request(method, path, body, self.headers | (headers or {}))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), dict(answer.getheaders())
        finally:
            connection.close()

    def open(self, body, path="/v1/completions"):
        """A socket with the request sent and nothing read."""
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(raw)}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items())
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        sock.sendall(head.encode() + b"\r\n" + raw)
        return sock

    def settled(self, seconds=10.0):
        """Wait until nothing runs and nothing waits."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            _, health, _ = self.ask("GET", "/health")
            if health["running"] == health["waiting"] == 0:
                return True
            time.sleep(0.05)
        return False


def asked(most=8, **more):
    return {"model": "tiny", "prompt": f"import {MARK}", "max_tokens": most, "temperature": 0} | more


@contextmanager
def inside(limits, token=None):
    """A server in a thread of this process."""
    ready = serve.served(long_model(), tiny_tokenizer(), "tiny", limits)
    gate = serve.application(ready, key=token)
    listening = serve._listen("127.0.0.1", 0)
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


def test_a_full_queue_is_429_and_a_cut_connection_frees_its_place():
    with inside(Limits(queue=2, batch=1)) as (client, ready):
        socks = []
        for waiting in (0, 1, 2):
            socks.append(client.open(asked(4000, stream=True)))
            until = time.monotonic() + 10
            while not (ready.engine.running and ready.engine.waiting == waiting) and time.monotonic() < until:
                time.sleep(0.01)
        status, body, headers = client.ask("POST", "/v1/completions", asked())
        assert status == 429 and body["error"]["code"] == "queue_full"
        assert int({k.lower(): v for k, v in headers.items()}["retry-after"]) >= 1
        socks[0].recv(100)
        for sock in socks:
            sock.close()  # one runs, two wait
        assert client.settled(5)  # 12,000 tokens would take far longer
        assert client.ask("POST", "/v1/completions", asked())[0] == 200


def test_a_cut_connection_ends_an_answer_that_is_not_streamed():
    with inside(Limits()) as (client, ready):
        sock = client.open(asked(4000))
        while not ready.engine.running:
            time.sleep(0.01)
        sock.close()
        assert client.settled(3)


def test_the_time_limit_ends_whole_answers_and_streams():
    with inside(Limits(seconds=0.5)) as (client, _):
        status, body, _ = client.ask("POST", "/v1/completions", asked(4000))
        assert status == 504 and body["error"]["code"] == "timeout"
        with client.open(asked(4000, stream=True)) as sock:
            text = b""
            while chunk := sock.recv(65536):
                text += chunk
                if b"timeout" in text:
                    break
        assert b"200 OK" in text and b'"error"' in text and b"[DONE]" not in text
        assert client.settled(2)


def test_a_reader_that_does_not_read_holds_nobody_up():
    with inside(Limits()) as (client, _):
        idle = [client.open(asked(300, stream=True)) for _ in range(5)]
        assert client.ask("POST", "/v1/completions", asked())[0] == 200
        assert client.settled()
        for sock in idle:
            sock.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("served") / "tiny"
    _load.save(long_model(), tiny_tokenizer(context=CONTEXT), place)
    return place


@contextmanager
def process(folder, *options, env=None) -> Iterator:
    command = [sys.executable, "-m", "smelt", "serve", str(folder), "--port", "0", *options]
    log = folder.parent / f"log-{time.monotonic_ns()}"
    with log.open("wb") as file:
        child = subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | (env or {}))
    try:
        until = time.monotonic() + 120
        while " at http://127.0.0.1:" not in log.read_text():
            assert child.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield child, int(log.read_text().split(" at http://127.0.0.1:")[1].split("/")[0]), log
    finally:
        child.kill()
        child.wait()


@pytest.fixture(scope="module")
def server(folder):
    with process(folder, "--body-limit", "20000", env={serve.TOKEN: TOKEN}) as (child, port, log):
        yield Client(port, TOKEN), log, child
        assert child.poll() in (None, 0), "the server did not survive the tests"
        assert TOKEN not in log.read_text() and MARK not in log.read_text() and "Traceback" not in log.read_text(), log.read_text()


WRONG = [
    ("{", 400, None),
    (b"\xff\xfe", 400, None),
    ("[" * 9000, 400, None),
    ("9" * 9000, 400, None),
    ("[1]", 400, None),
    ("null", 400, None),
    (asked(model=1), 400, "model"),
    (asked(model="other"), 404, "model"),
    (asked(model="\ud800"), 404, "model"),
    (asked(prompt=5), 400, "prompt"),
    (asked(prompt=[1, "x"]), 400, "prompt"),
    (asked(prompt=["a", "b"]), 400, "prompt"),
    (asked(prompt=[100000]), 400, "prompt"),
    (asked(prompt=""), 400, "prompt"),
    (asked(prompt="\ud800"), 400, None),
    (asked(prompt="x " * 5000), 400, "prompt"),
    (asked(most=CONTEXT), 400, "prompt"),
    (asked(most="8"), 400, "max_tokens"),
    (asked(most=0), 400, "max_tokens"),
    (asked(most=True), 400, "max_tokens"),
    (asked(temperature="hot"), 400, "temperature"),
    (asked(temperature=float("nan")), 400, "temperature"),
    (asked(temperature=-1), 400, "temperature"),
    (asked(top_p=2), 400, "top_p"),
    (asked(seed=2**64), 400, "seed"),
    (asked(seed=1.5), 400, "seed"),
    (asked(stop=[""]), 400, "stop"),
    (asked(stop=["a"] * 17), 400, "stop"),
    (asked(stream="yes"), 400, "stream"),
    (asked(stream_options={"include_usage": True}), 400, "stream_options"),
    (asked(n=2), 400, None),
    (asked(echo=True), 400, None),
    (asked(logprobs=0), 400, None),
    (asked(logit_bias={"1": 5}), 400, None),
    (asked(bogus=1), 400, "bogus"),
]


@pytest.mark.parametrize("body, status, param", WRONG, ids=range(len(WRONG)))
def test_wrong_bodies_are_refused_in_openais_shape(server, body, status, param):
    client, _, _ = server
    got, answer, _ = client.ask("POST", "/v1/completions", body)
    assert got == status, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["message"]
    if param:
        assert answer["error"]["param"] == param


@pytest.mark.parametrize(
    "messages", [[], "hi", [{"role": "robot", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": [{"type": "image_url"}]}]]
)
def test_wrong_chats_are_refused(server, messages):
    client, _, _ = server
    body = {"model": "tiny", "messages": messages, "max_tokens": 4}
    assert client.ask("POST", "/v1/chat/completions", body)[0] == 400


def test_the_gate(server):
    client, _, _ = server
    stranger = Client(client.port, "sesame-4712")
    assert stranger.ask("POST", "/v1/completions", asked())[0] == 401
    assert Client(client.port).ask("GET", "/v1/models")[0] == 401
    assert Client(client.port).ask("GET", "/health")[0] == 200
    assert client.ask("GET", "/v1/models", headers={"Host": "evil.example"})[0] == 400
    assert client.ask("POST", "/v1/completions", asked(), headers={"Content-Type": "text/plain"})[0] == 415
    assert client.ask("POST", "/v1/completions", asked(prompt="x" * 30000))[0] == 413
    assert client.ask("GET", "/v1/completions")[0] == 405
    assert client.ask("GET", f"/v1/{TOKEN}?key={TOKEN}")[0] == 404
    assert client.ask("GET", "/v1/models/other")[0] == 404


def test_oversized_bodies_without_a_length_and_with_a_false_one(server):
    client, _, _ = server
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    chunked = "Transfer-Encoding: chunked\r\n\r\n" + 4 * ("2000\r\n" + "x" * 0x2000 + "\r\n") + "0\r\n\r\n"
    for rest in (chunked, "Content-Length: 99999999999\r\n\r\nx"):
        with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sock:
            sock.sendall((head + rest).encode())
            assert b" 413 " in sock.recv(4096)
    with socket.create_connection(("127.0.0.1", client.port), timeout=30) as sock:  # cut inside the body
        sock.sendall((head + "Content-Length: 100\r\n\r\n{").encode())
    assert client.ask("GET", "/health")[0] == 200


def test_the_openai_client(server):
    openai = pytest.importorskip("openai")
    client, _, _ = server
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key=TOKEN, max_retries=0) as ai:
        assert [model.id for model in ai.models.list()] == ["tiny"]
        assert ai.models.retrieve("tiny").owned_by == "smelt"
        messages = [{"role": "system", "content": "brief"}, {"role": "user", "content": [{"type": "text", "text": MARK}]}]
        settings = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
        whole = ai.chat.completions.create(**settings)
        assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
        chunks = list(ai.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        text = ai.completions.create(model="tiny", prompt=MARK, max_tokens=5, temperature=0)
        streamed = list(ai.completions.create(model="tiny", prompt=MARK, max_tokens=5, temperature=0, stream=True))
        assert "".join(c.choices[0].text for c in streamed) == text.choices[0].text
        with pytest.raises(openai.NotFoundError):
            ai.completions.create(model="gpt-5", prompt="x")
        with pytest.raises(openai.BadRequestError):
            ai.completions.create(model="tiny", prompt="x", n=3)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="wrong", max_retries=0) as ai:
        with pytest.raises(openai.AuthenticationError):
            ai.models.list()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server):
    client, _, _ = server
    command = ["curl", "-sSN", f"http://127.0.0.1:{client.port}/v1/completions", "-H", f"Authorization: Bearer {TOKEN}"]
    command += ["-H", "Content-Type: application/json", "-d", json.dumps(asked(5, stream=True))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    lines = [line for line in done.stdout.split("\n") if line]
    assert done.returncode == 0 and lines[-1] == "data: [DONE]"
    assert all(json.loads(line.removeprefix("data: "))["object"] == "text_completion" for line in lines[:-1])


async def streamed(port, body):
    """The text and the usage of one stream, or the error it ended with."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    raw = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Authorization: Bearer {TOKEN}\r\nContent-Length: {len(raw)}\r\n\r\n".encode() + raw)
    text, usage, done = "", None, False
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: "):
            event = json.loads(line[6:])
            assert "error" not in event, event
            text += "".join(choice["text"] for choice in event["choices"])
            usage = event.get("usage") or usage
    writer.close()
    await writer.wait_closed()
    assert done
    return text, usage


def test_64_clients_at_once_lose_nothing(server):
    client, _, _ = server

    async def main():
        bodies = [asked(8 + i % 9, prompt=f"import {MARK}{i % 7}", stream=True, stream_options={"include_usage": True}) for i in range(64)]
        bodies += [body | {"stream": True} for body in bodies[:7]]
        return bodies, await asyncio.gather(*(streamed(client.port, body) for body in bodies))

    bodies, answers = asyncio.run(main())
    alone = [asyncio.run(streamed(client.port, body)) for body in bodies[:16]]
    for body, (_, usage) in zip(bodies, answers):
        assert usage["completion_tokens"] == body["max_tokens"]
    assert [text for text, _ in answers[:16]] == [text for text, _ in alone]


def test_a_taken_port_and_a_wrong_method_are_one_line(folder):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with pytest.raises(SmeltError, match="cannot be listened on"):
            serve.serve(str(folder), port=sock.getsockname()[1])
    with pytest.raises(SmeltError, match="no method 'kivy'"):
        serve.serve(str(folder), port=0, cache="kivy()")


def test_the_command_passes_its_options_on(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from smelt import cli

    seen = {}
    monkeypatch.setattr(serve, "serve", lambda model, **options: seen.update(options, model=model))
    words = [
        "serve",
        "embedded",
        "--cache",
        "kivi(bits=2)",
        "--decode",
        "prompt_lookup()",
        "--attention",
        "top_k()",
        "--rank",
        "first_token()",
        "--port",
        "9",
        "--queue",
        "3",
    ]
    words += ["--batch", "4", "--time-limit", "5", "--body-limit", "6", "--stop-limit", "7", "--token-file", str(tmp_path), "--name", "n"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert seen["limits"] == Limits(queue=3, batch=4, seconds=5, body=6, stop=7)
    assert (
        seen["token_file"] == tmp_path
        and seen["host"] == "127.0.0.1"
        and (seen["model"], seen["port"], seen["name"]) == ("embedded", 9, "n")
    )
    assert (seen["cache"], seen["decode"], seen["attention"]) == ("kivi(bits=2)", "prompt_lookup()", "top_k()")
    assert seen["rank"] == "first_token()"


def test_sigterm_finishes_what_runs_and_refuses_the_rest(server):
    """The last one: it ends the server of the others."""
    client, log, child = server
    sock = client.open(asked(600, stream=True))
    sock.recv(200)
    child.send_signal(signal.SIGTERM)
    until = time.monotonic() + 5
    while client.ask("GET", "/health")[0] == 200 and time.monotonic() < until:
        time.sleep(0.02)
    status, body, _ = client.ask("POST", "/v1/completions", asked())
    assert status == 503 and body["error"]["code"] == "stopping"
    text = b""
    while chunk := sock.recv(65536):
        text += chunk
    sock.close()
    assert b"data: [DONE]" in text
    assert child.wait(20) == 0, log.read_text()
