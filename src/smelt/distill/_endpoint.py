"""A teacher that is only text: a server of OpenAI's chat completions, asked politely and with patience."""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import math
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from smelt.spec import SmeltError

__all__ = ["Endpoint"]

AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # what may be better a moment later
LONGEST = 1 << 24  # bytes of an answer
PATIENCE = 300.0  # seconds, the most that is waited for between two tries


class _Passing(Exception):
    """Worth another try, after `seconds` when the server says so."""

    def __init__(self, what: str, seconds: float | None = None):
        super().__init__(what)
        self.seconds = seconds


@dataclass
class Endpoint:
    """`answers(prompts, new, temperature, seed)` yields (index, text) as answers arrive, at most `parallel` being awaited.

    `url` is the address before /chat/completions (https://host/v1); `key` names the environment variable that holds the
    key, which is read when asking, sent in the header, and in no message, `repr` or identity. A refusal that may pass (429,
    5xx, a closed connection, no answer in `timeout` seconds, an answer that is no chat completion) is tried again
    `retries` times, after the server's Retry-After or after 0.5, 1, 2, ... seconds with some chance in them. Requests,
    tries included, start at least 60 / `per_minute` seconds apart (0: no limit).

    `cost` counts requests and the tokens that the server reports: {"requests", "prompt_tokens", "completion_tokens"}.
    When one prompt fails for good, what was already asked for is still yielded; then SmeltError is raised.
    Raises SmeltError for an address that is none, for a key over plain http to another machine, and for a key not set.
    Redirects are not followed: the key would go with them.
    """

    url: str
    model: str
    key: str = ""
    per_minute: float = 0.0
    parallel: int = 4
    timeout: float = 60.0
    retries: int = 6
    backoff: float = 0.5  # seconds before the second try, doubled for every further one
    cost: dict[str, int] = field(default_factory=lambda: {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0})

    def __post_init__(self) -> None:
        self.parallel, self.retries = int(self.parallel), int(self.retries)
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname or "", parts.port
        except ValueError:
            raise SmeltError("endpoint: the address is not one; write https://host/v1") from None
        if parts.username or parts.password or parts.query or parts.fragment:
            raise SmeltError("endpoint: the address holds more than a place; give a key by the name of an environment variable: key: NAME")
        if parts.scheme not in ("http", "https") or not host or not self.url.isascii() or any(c <= " " for c in self.url):
            raise SmeltError(f"endpoint: {self.url!r} is not an address; write https://host/v1")
        self.near = _loopback(host)
        if self.key and parts.scheme == "http" and not self.near:
            raise SmeltError(f"endpoint: a key over plain http to {host} could be read on the way; write https://")
        if min(self.parallel, self.timeout) <= 0 or min(self.per_minute, self.retries, self.backoff) < 0:
            raise SmeltError("endpoint: parallel and timeout are above 0; per_minute and retries are not negative")
        self.host, self.address = host, self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        handlers: list[Any] = [_Stay()] + [urllib.request.ProxyHandler({})] * self.near  # no proxy is on the way to oneself
        self._open = urllib.request.build_opener(*handlers).open
        self._lock, self._next = threading.Lock(), 0.0

    def identity(self) -> str:
        """What an answer depends on beside the prompt."""
        return f"{self.address} {self.model}"

    def answers(self, prompts: Sequence[str], new: int, temperature: float, seed: int | Sequence[int] = 0) -> Iterator[tuple[int, str]]:
        """One seed for each prompt, or one for all: that one is sent at temperature 0 only, where it cannot make two samples alike."""
        key = self._key()
        bodies = []
        for at, prompt in enumerate(prompts):
            body = {"model": self.model, "messages": [{"role": "user", "content": prompt}], "max_tokens": new, "temperature": temperature}
            if not isinstance(seed, int):
                body["seed"] = seed[at]
            elif temperature == 0:
                body["seed"] = seed
            bodies.append(body)
        stop, rest = threading.Event(), iter(range(len(bodies)))
        waiting: dict[Future[str], int] = {}
        failed: BaseException | None = None
        pool = ThreadPoolExecutor(self.parallel, thread_name_prefix="endpoint")
        try:
            while True:
                while failed is None and len(waiting) < self.parallel and (at := next(rest, -1)) >= 0:
                    waiting[pool.submit(self._answer, bodies[at], key, stop)] = at
                if not waiting:
                    break
                done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in sorted(done, key=waiting.__getitem__):
                    at = waiting.pop(future)
                    if (error := future.exception()) is None:
                        yield at, future.result()
                    else:
                        failed = failed or error
                        stop.set()  # the others end the try they are at, and make no new one
        finally:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        if failed is not None:
            raise failed

    def _key(self) -> str:
        if not self.key:
            return ""
        key = os.environ.get(self.key, "").strip()
        if not key:
            raise SmeltError(f"endpoint: the environment variable {self.key} holds no key")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise SmeltError(f"endpoint: what is in the environment variable {self.key} cannot be a key")
        return key

    def _answer(self, body: dict[str, Any], key: str, stop: threading.Event) -> str:
        for tried in range(self.retries + 1):
            try:
                return self._ask(json.dumps(body).encode(), key, stop)
            except _Passing as trouble:
                if tried == self.retries or stop.is_set():
                    raise SmeltError(f"endpoint {self.host}: {trouble}; gave up after {tried + 1} tries") from None
                pause = self.backoff * 2**tried * random.uniform(1, 1.5) if trouble.seconds is None else trouble.seconds
                stop.wait(min(pause, PATIENCE))
        raise AssertionError("unreachable")

    def _turn(self, stop: threading.Event) -> None:
        """Wait for this request's place in the rate limit."""
        if not self.per_minute:
            return
        with self._lock:
            start = max(self._next, time.monotonic())
            self._next = start + 60 / self.per_minute
        stop.wait(max(0.0, start - time.monotonic()))

    def _ask(self, body: bytes, key: str, stop: threading.Event) -> str:
        self._turn(stop)
        if stop.is_set():
            raise _Passing("another prompt failed before this one was asked")
        headers = {"Content-Type": "application/json", "User-Agent": "smelt"} | ({"Authorization": f"Bearer {key}"} if key else {})
        with self._lock:
            self.cost["requests"] += 1
        try:
            with self._open(urllib.request.Request(self.address, body, headers), timeout=self.timeout) as answer:
                text = _read(answer, self.timeout)
        except urllib.error.HTTPError as error:
            with error:
                said = _message(error, key)
                what, after = f"it answered {error.code}{said}", _after(error.headers.get("Retry-After"))
            if error.code in AGAIN:
                raise _Passing(what, after) from None
            raise SmeltError(f"endpoint {self.host}: {what}") from None
        except urllib.error.URLError as error:
            raise _Passing(f"no connection ({error.reason})") from None
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(f"no whole answer ({type(error).__name__})") from None
        try:
            about = json.loads(text)
            made = about["choices"][0]["message"]["content"]
            usage = about.get("usage") or {}
            counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            made = None
        if not isinstance(made, str):
            raise _Passing("its answer is not a chat completion with text")
        with self._lock:
            for name, count in counts.items():
                self.cost[name] += count
        return made


class _Stay(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        return None


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read(answer: Any, seconds: float) -> bytes:
    """The whole body; a server that sends drop by drop has no more time than one that is silent."""
    end, size = time.monotonic() + seconds, 0
    parts: list[bytes] = []
    while part := answer.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > LONGEST or time.monotonic() > end:
            raise TimeoutError
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _message(error: urllib.error.HTTPError, key: str) -> str:
    """What the server says of its refusal: short, and without the key."""
    try:
        text = error.read(1 << 14).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        return ""
    try:
        about = json.loads(text)
        found = about.get("error", about)
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    except (ValueError, AttributeError, RecursionError):
        pass
    text = " ".join((text.replace(key, "***") if key else text).split())[:200]
    return f": {text}" if text else ""


def _after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, given as seconds or as a date."""
    if not value:
        return None
    try:
        at = float(value) if value.strip()[:1].isdigit() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, at) if math.isfinite(at) else None
