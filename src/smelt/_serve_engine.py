"""The one thread that owns the model, and the bounded queue before it.

Requests are jobs. A job says with `together` which others it may share one run with; the head of the queue is always
taken, with those behind it that fit. Events go back to the event loop that asked, and a job nobody waits for any more
is dropped from the queue, or ends at its next token.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from smelt.spec import SmeltError

__all__ = ["Done", "Engine", "Failed", "Job", "Limits", "Refused", "Served"]

log = logging.getLogger("smelt.serve")


class Refused(Exception):
    """A request that gets no answer: the status, one sentence, and OpenAI's machine-readable code."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}


class Done(NamedTuple):
    """The last event of a job that went well."""

    reason: str  # "stop" or "length"
    prompt: int  # tokens
    made: int  # tokens, an end-of-text token included


class Failed(NamedTuple):
    """The last event of a job that did not."""

    status: int
    message: str


class Job(ABC):
    """Made and waited for in an event loop, run in the engine's thread."""

    def __init__(self, seconds: float, together: Any = None):
        self.together = together  # jobs with equal values other than None run as one
        self.until = time.monotonic() + seconds
        self.over = False  # ended, failed or given up
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Any] = asyncio.Queue()

    @abstractmethod
    def run(self, model: Any, jobs: Sequence[Job], join: Callable[[int], Sequence[Job]]) -> None:
        """Do the work of all `jobs`, this one the first of them. They have equal `together`. `join(n)`, asked when n of them are
        left, gives those that came meanwhile and may still run with them; their work is then this run's too."""

    def deliver(self, event: Any) -> None:
        """From the engine's thread: a piece of the answer, or its end."""
        if isinstance(event, (Done, Failed)):
            self.over = True
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody waits
            self.over = True

    async def event(self) -> Any:
        """The next event. Refused when the time is up or the work failed."""
        try:
            async with asyncio.timeout(max(0.0, self.until - time.monotonic())):
                event = await self._events.get()
        except TimeoutError:
            self.over = True
            message = "the time limit of a request is over; ask for fewer tokens, or set a higher --time-limit"
            raise Refused(504, message, "timeout", headers={"x-should-retry": "false"}) from None
        if isinstance(event, Failed):
            raise Refused(event.status, event.message)
        return event


@dataclass(frozen=True)
class Limits:
    """What one server bears."""

    queue: int = 128  # requests that wait
    batch: int = 16  # rows of one call of the model
    seconds: float = 120.0  # of one request, waiting included
    body: int = 1 << 20  # bytes
    stop: float = 30.0  # seconds that running requests get after SIGTERM


class Engine:
    def __init__(self, model: Any, limits: Limits):
        self.model, self.limits = model, limits
        self.stopping = False
        self.running: list[Job] = []
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._pace = 1.0 / limits.batch  # seconds per job, smoothed over runs
        self._ran = 0  # jobs of the run that goes on, those that joined it too
        self._thread = threading.Thread(target=self._work, name="smelt-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        with self._changed:
            if self.stopping or self._closed:
                raise Refused(503, "the server is stopping", "stopping")
            if len(self._waiting) >= self.limits.queue:
                wait = max(1, math.ceil(self._pace * len(self._waiting)))
                message = f"{len(self._waiting)} requests are waiting already; try again in {wait} s"
                raise Refused(429, message, "queue_full", headers={"Retry-After": str(wait)})
            self._waiting.append(job)
            self._changed.notify()

    def give_up(self, job: Job) -> None:
        """Nobody waits for it: out of the queue, or over at its next token."""
        job.over = True
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self, seconds: float = 5.0) -> None:
        """End what runs and waits, and the thread."""
        with self._changed:
            self.stopping = self._closed = True
            jobs = [*self._waiting, *self.running]
            self._waiting.clear()
            for job in jobs:
                if not job.over:
                    job.deliver(Failed(503, "the server is stopping"))
            self._changed.notify()
        self._thread.join(seconds)

    def _take(self) -> list[Job]:
        """The head of the queue and those that may run with it; empty at the end."""
        with self._changed:
            while True:
                while self._waiting and self._waiting[0].over:
                    self._waiting.popleft()
                if self._closed:
                    return []
                if self._waiting:
                    break
                self._changed.wait()
            head = self._waiting.popleft()
            jobs = [head]
            if head.together is not None:
                others = [job for job in self._waiting if job.together == head.together and not job.over]
                jobs += others[: self.limits.batch - 1]
            for job in jobs[1:]:
                self._waiting.remove(job)
            self.running, self._ran = jobs, len(jobs)
            return jobs

    def _join(self, left: int) -> list[Job]:
        """Those at the head of the queue that may run with what runs, `left` of which are left. Whoever waits behind another kind
        of job waits for it, so none waits for ever."""
        with self._changed:
            jobs: list[Job] = []
            together = self.running[0].together
            while self._waiting and not self._closed and together is not None and left + len(jobs) < self.limits.batch:
                if not self._waiting[0].over and self._waiting[0].together != together:
                    break
                job = self._waiting.popleft()
                jobs += [] if job.over else [job]
            self._ran += len(jobs)
            self.running[:] = [job for job in self.running if not job.over] + jobs or self.running[:1]
            return jobs

    def _work(self) -> None:
        torch.seed()  # else unseeded samples would be the same after every start
        while jobs := self._take():
            began = time.monotonic()
            try:
                jobs[0].run(self.model, list(jobs), self._join)
                failed = Failed(500, "the model gave no answer")
            except SmeltError as error:
                failed = Failed(400, str(error))
            except Exception as error:  # messages may quote the prompt, so only the kind is told
                place = error.__traceback__
                while place is not None and place.tb_next is not None:
                    place = place.tb_next
                where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "?"
                log.error("%s at %s while %d requests ran", type(error).__name__, where, len(jobs))
                failed = Failed(500, f"internal error: {type(error).__name__}")
            for job in jobs:
                if not job.over:
                    job.deliver(failed)
            with self._changed:
                self.running = []
            self._pace += 0.2 * ((time.monotonic() - began) / self._ran - self._pace)
            jobs = []  # an idle engine holds no prompt


@dataclass(frozen=True)
class Served:
    """What a router needs to answer."""

    name: str
    engine: Engine
    tokenizer: Any
    context: int  # tokens of prompt and answer together
    alone: bool  # one text at a time
    created: int  # seconds since 1970
    limits: Limits
