from __future__ import annotations

import contextlib
import email.utils
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from smelt.distill._endpoint import Endpoint, _after
from smelt.spec import SmeltError
from smelt.train import Course

# A server of its own process. A prompt is a list of what its first, second, ... request meets; the last one stays.
SERVER = r"""
import json, sys, threading, time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

seen, log, lock, now = Counter(), [], threading.Lock(), [0, 0]


class Handler(BaseHTTPRequestHandler):
    counted = False

    def log_message(self, *args):
        pass

    def leave(self):  # before the answer: who has it may ask again at once
        with lock:
            now[0] -= self.counted
            self.counted = False

    def send(self, code, body, **headers):
        self.leave()
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.send(200, json.dumps({"log": log, "together": now[1]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with lock:
            at = seen[prompt]
            seen[prompt] += 1
            log.append({"path": self.path, "key": self.headers["Authorization"], "at": time.monotonic(), **body})
            now[0] += 1
            now[1] = max(now)
            self.counted = True
        words = prompt.split("#")[0].split()
        try:
            self.meet(words[min(at, len(words) - 1)], prompt)
        except OSError:
            pass  # the client went away
        finally:
            self.leave()

    def meet(self, what, prompt):
        usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
        good = json.dumps({"choices": [{"message": {"content": "to " + prompt}}], "usage": usage}).encode()
        if what == "ok":
            self.send(200, good)
        elif what == "busy":
            time.sleep(0.15)
            self.send(200, good)
        elif what == "slow":
            time.sleep(2)
            self.send(200, good)
        elif what == "drip":
            self.send_response(200)
            self.end_headers()
            for byte in good[:40]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.1)
        elif what == "half":
            self.send_response(200)
            self.send_header("Content-Length", str(len(good)))
            self.end_headers()
            self.wfile.write(good[: len(good) // 2])
            self.close_connection = True
        elif what == "closed":
            self.close_connection = True
        elif what == "garbled":
            self.send(200, b'{"choices": [')
        elif what == "odd":
            self.send(200, b'{"choices": [{"message": {"content": null}}], "usage": []}')
        elif what == "wait":
            self.send(429, b"{}", Retry_After="1")
        elif what == "moved":
            self.send(302, b"", Location="http://127.0.0.1:1/elsewhere")
        else:  # a status; the message gives the key back, as some servers do
            self.send(int(what), json.dumps({"error": {"message": "no: " + str(self.headers["Authorization"])}}).encode())


class Server(ThreadingHTTPServer):
    daemon_threads = True


server = Server(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def serving():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture
def server():
    with serving() as url:
        yield url


def asked(url):
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as answer:
        return json.load(answer)


def endpoint(url, **more):
    return Endpoint(f"{url}/v1", "m", **({"timeout": 0.5, "backoff": 0.01, "retries": 3} | more))


def test_answers_come_with_their_index_and_what_was_asked_is_what_was_meant(server, monkeypatch):
    monkeypatch.setenv("KEY", "s3cret")
    prompts = [f"ok # {i}" for i in range(10)]
    one = endpoint(server, key="KEY")
    got = dict(one.answers(prompts, 5, 0.7, list(range(10))))
    assert got == {i: f"to {prompt}" for i, prompt in enumerate(prompts)}
    log = asked(server)["log"]
    assert {entry["path"] for entry in log} == {"/v1/chat/completions"}
    assert {entry["key"] for entry in log} == {"Bearer s3cret"}
    for entry in log:
        assert (entry["model"], entry["max_tokens"], entry["temperature"]) == ("m", 5, 0.7)
        assert entry["messages"] == [{"role": "user", "content": prompts[entry["seed"]]}]
    assert one.cost == {"requests": 10, "prompt_tokens": 70, "completion_tokens": 30}
    assert "s3cret" not in one.identity() + repr(one)


def test_one_seed_is_not_sent_where_it_would_make_samples_alike(server):
    dict(endpoint(server).answers(["ok # a"], 5, 0.0, 3))
    dict(endpoint(server).answers(["ok # b"], 5, 1.0, 3))
    assert [entry.get("seed") for entry in asked(server)["log"]] == [3, None]


@pytest.mark.parametrize("what", ["429", "500", "503", "slow", "drip", "half", "closed", "garbled", "odd"])
def test_what_may_pass_is_tried_again(server, what):
    one = endpoint(server)
    prompt = f"{what} {what} ok"
    assert list(one.answers([prompt], 5, 0.0)) == [(0, f"to {prompt}")]
    assert one.cost == {"requests": 3, "prompt_tokens": 7, "completion_tokens": 3}


def test_it_gives_up_in_the_end_and_says_why(server):
    with pytest.raises(SmeltError, match=r"127\.0\.0\.1: it answered 500.*; gave up after 4 tries"):
        list(endpoint(server).answers(["500"], 5, 0.0))
    assert len(asked(server)["log"]) == 4


@pytest.mark.parametrize("what", ["400", "401", "404", "moved"])
def test_a_refusal_that_stays_is_not_repeated_and_shows_no_key(server, what, monkeypatch):
    monkeypatch.setenv("KEY", "s3cret")
    with pytest.raises(SmeltError) as caught:
        list(endpoint(server, key="KEY").answers([what], 5, 0.0))
    assert f"it answered {302 if what == 'moved' else what}" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert what == "moved" or "no: Bearer ***" in str(caught.value)
    assert len(asked(server)["log"]) == 1


def test_what_was_asked_for_is_yielded_before_a_failure_is_raised(server):
    found = []
    with pytest.raises(SmeltError, match="404"):
        for at, _ in endpoint(server, parallel=3).answers(["busy # 0", "404", "busy # 2", *(f"ok # {i}" for i in range(3, 30))], 5, 0.0):
            found.append(at)
    log = asked(server)["log"]
    assert len(found) == len(log) - 1  # whatever reached the server came back
    assert {0, 2} <= set(found)
    assert len(log) < 30


def test_the_server_says_how_long_to_wait(server):
    began = time.monotonic()
    assert list(endpoint(server).answers(["wait ok"], 5, 0.0))
    first, second = (entry["at"] for entry in asked(server)["log"])
    assert 1 <= second - first <= time.monotonic() - began
    assert _after("2.5") == 2.5
    assert 58 < _after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 60
    assert _after(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0
    assert [_after(text) for text in (None, "", "soon", "1e999", "9 o'clock")] == [None] * 5


def test_no_more_at_once_than_allowed(server):
    prompts = [f"busy # {i}" for i in range(9)]
    began = time.monotonic()
    assert len(dict(endpoint(server, parallel=3).answers(prompts, 5, 0.0))) == 9
    assert asked(server)["together"] == 3
    assert time.monotonic() - began >= 3 * 0.15


def test_no_faster_than_allowed(server):
    prompts = ["429 ok", *(f"ok # {i}" for i in range(3))]
    assert len(dict(endpoint(server, per_minute=600).answers(prompts, 5, 0.0))) == 4
    starts = sorted(entry["at"] for entry in asked(server)["log"])
    assert len(starts) == 5
    # they leave a tenth of a second apart; on a busy machine one may arrive late, never all of them early
    assert starts[-1] - starts[0] >= 4 * 0.1 - 0.05


@pytest.mark.parametrize(
    "change, said",
    [
        ({"url": "http://example.com/v1", "key": "KEY"}, "plain http to example.com"),
        ({"url": "http://127.0.0.1.example.com/v1", "key": "KEY"}, "plain http"),
        ({"url": "https://u:s3cret@example.com/v1"}, "more than a place"),
        ({"url": "https://example.com/v1?key=s3cret"}, "more than a place"),
        ({"url": "ftp://example.com"}, "is not an address"),
        ({"url": "example.com/v1"}, "is not an address"),
        ({"url": "http://[::1"}, "is not one"),
        ({"parallel": 0}, "parallel and timeout"),
        ({"per_minute": -1.0}, "not negative"),
    ],
)
def test_settings_that_will_not_do(change, said):
    with pytest.raises(SmeltError) as caught:
        Endpoint(**({"url": "http://localhost/v1", "model": "m"} | change))
    assert said in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_key_may_go_to_this_machine_and_over_https():
    for url in ("http://localhost:8/v1", "http://127.0.0.1/v1", "http://[::1]:8/v1", "https://example.com/v1/chat/completions"):
        assert Endpoint(url, "m", key="KEY").address.count("/chat/completions") == 1


def test_a_key_that_is_not_there_or_cannot_be_one(monkeypatch):
    monkeypatch.delenv("KEY", raising=False)
    with pytest.raises(SmeltError, match="KEY holds no key"):
        list(Endpoint("http://localhost/v1", "m", key="KEY").answers(["x"], 1, 0.0))
    monkeypatch.setenv("KEY", "s3cret\nX-Other: 1")
    with pytest.raises(SmeltError, match="KEY cannot be a key") as caught:
        list(Endpoint("http://localhost/v1", "m", key="KEY").answers(["x"], 1, 0.0))
    assert "s3cret" not in str(caught.value)


CLIENT = """
import os, signal, sys
from pathlib import Path
from smelt.distill._endpoint import Endpoint
from smelt.journal import Journal
from smelt.train import Course

put, left = Journal.put, int(sys.argv[3])
def dying(self, key, value):
    put(self, key, value)
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
Journal.put = dying
one = Endpoint(sys.argv[1] + "/v1", "m", parallel=1, backoff=0.01)
Course(None, (), None, None, Path(sys.argv[2]), speaker=one).ask([f"429 ok # {i}" for i in range(6)], 5, times=2, temperature=1.0)
"""


def test_a_killed_run_asks_for_nothing_twice(server, tmp_path):
    """Killed without warning after its 5th answer; then again from the start, in this process."""
    done = subprocess.run([sys.executable, "-c", CLIENT, server, str(tmp_path), "5"], env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == -signal.SIGKILL
    before = len(asked(server)["log"])
    one = endpoint(server, parallel=1)
    course = Course(None, (), None, None, Path(tmp_path), speaker=one)
    prompts = [f"429 ok # {i}" for i in range(6)]
    got = course.ask(prompts, 5, times=2, temperature=1.0)
    assert got == [f"to {prompt}" for prompt in prompts for _ in range(2)]
    log = asked(server)["log"]
    # two answers for each prompt, and the one refusal that every prompt meets first
    assert len(log) == 6 * 2 + 6
    assert before == 5 + 3 and one.cost["requests"] == len(log) - before
    assert course.ask(prompts, 5, times=2, temperature=1.0) == got
    assert len(asked(server)["log"]) == len(log)
