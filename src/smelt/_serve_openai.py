"""OpenAI's protocol: chat completions, completions, models. What is not supported is refused, never ignored.

A chat is rendered by the tokenizer's own template. Where there is none it is written out plainly:

    system: Be brief.

    user: Hello

    assistant:

and an answer ends where the model begins a turn of the user by itself (`\\n\\nuser:`).
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, model_validator

from smelt._serve_engine import Done, Job, Refused, Served
from smelt._serve_write import Choice, Writing

__all__ = ["Stream", "router", "wait"]

GRACE = 5.0  # seconds a stream gets beyond the time limit to send what it has
TURN = "\n\nuser:"
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")  # change no text
NEUTRAL: dict[str, tuple[Any, ...]] = {  # known fields that are not supported, and the values that ask for nothing
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Options(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class _Asked(_Strict):
    model: str
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(ge=0, le=1)] = None
    seed: Annotated[int | None, Field(ge=-(2**63), le=2**63 - 1)] = None
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: _Options | None = None

    @model_validator(mode="before")
    @classmethod
    def _neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {name: value for name, value in data.items() if name not in IGNORED}
        for name, values in NEUTRAL.items():
            value = kept.pop(name, None)
            if value is not None and not any(type(value) is type(free) and value == free for free in values):
                only = f", only {values[0]!r}" if values else ""
                raise ValueError(f"'{name}' is not supported{only}")
        return kept

    def stops(self) -> list[str]:
        return [] if self.stop is None else [self.stop] if isinstance(self.stop, str) else self.stop


class Completion(_Asked):
    prompt: str | list[str] | list[Annotated[int, Field(ge=0)]]


class _Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class Chat(_Asked):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None


async def wait(request: Request, job: Job, take: Callable[[Any], None]) -> Any:
    """The last event of a job; `take` gets those before it. A cut connection gives the job up and raises Refused."""

    async def reading() -> Any:
        while not isinstance(event := await job.event(), Done):
            take(event)
        return event

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(reading()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise Refused(499, "the connection was cut")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


class Stream(StreamingResponse):
    """Server-sent events of one job. A cut connection, or a reader too slow for the time limit, gives the job up."""

    def __init__(self, events: AsyncIterator[str], served: Served, job: Job):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.served, self.job = served, job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            async with asyncio.timeout(max(0.0, self.job.until - time.monotonic()) + GRACE):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            scope["smelt"]["dropped"] = "slow_reader"  # the response stays unfinished, and uvicorn cuts the connection
        finally:
            self.served.engine.give_up(self.job)


def router(served: Served) -> APIRouter:
    routes = APIRouter()
    about = {"id": served.name, "object": "model", "created": served.created, "owned_by": "smelt"}
    encoding = threading.Lock()  # a tokenizer serves one thread at a time

    def encode(text: str, special: bool) -> list[int]:
        with encoding:
            try:
                return served.tokenizer(text, add_special_tokens=special)["input_ids"]
            except (UnicodeError, TypeError) as error:
                raise Refused(400, "the prompt is not valid Unicode (a lone surrogate)") from error

    def rendered(messages: list[Message]) -> tuple[list[int], list[str]]:
        """Token ids of a chat, and what ends an answer besides the end of text."""
        turns = [{"role": message.role, "content": message.text()} for message in messages]
        if served.tokenizer.chat_template is None:
            text = "".join(f"{turn['role']}: {turn['content']}\n\n" for turn in turns)
            return encode(text + "assistant:", True), [TURN]
        try:
            text = served.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            first = str(error).strip().split("\n")[0][:200]
            raise Refused(400, f"the model's chat template refuses these messages: {first}", param="messages") from error
        return encode(text, False), []

    def prompted(prompt: str | list[str] | list[int]) -> tuple[list[int], list[str]]:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            rows = served.engine.model.get_input_embeddings().weight.shape[0]
            ids = [int(one) for one in prompt]
            if max(ids) >= rows:
                raise Refused(400, f"the prompt has the token {max(ids)}; the model knows {rows}", param="prompt")
            return ids, []
        if isinstance(prompt, list):
            if len(prompt) != 1:
                raise Refused(400, f"one prompt per request, not {len(prompt)}", param="prompt")
            prompt = str(prompt[0])
        return encode(prompt, True), []

    async def submitted(asked: _Asked, make: Callable[[], tuple[list[int], list[str]]], most: int | None) -> Writing:
        if asked.model != served.name:
            raise Refused(404, f"the model '{asked.model[:80]}' does not exist; there is '{served.name}'", "model_not_found", "model")
        if asked.stream_options is not None and not asked.stream:
            raise Refused(400, "stream_options is for streams; set stream to true", param="stream_options")
        if served.engine.stopping:
            raise Refused(503, "the server is stopping", "stopping")
        ids, stops = await asyncio.to_thread(make)
        if not ids:
            raise Refused(400, "the prompt is empty", param="prompt")
        room = served.context - len(ids)
        if room < (most or 1):
            message = f"the prompt has {len(ids)} tokens and {most or 1} more are asked for; the model's context is {served.context} tokens"
            raise Refused(400, message, "context_length_exceeded", "messages" if isinstance(asked, Chat) else "prompt")
        choice = Choice(1.0 if asked.temperature is None else asked.temperature, 1.0 if asked.top_p is None else asked.top_p, asked.seed)
        writing = Writing(served.tokenizer, ids, most or room, choice, [*asked.stops(), *stops], served.limits.seconds, served.alone)
        served.engine.submit(writing)
        return writing

    async def answered(request: Request, asked: _Asked, job: Writing, chat: bool) -> Any:
        counts = request.scope["smelt"]
        counts["prompt"] = len(job.ids)
        kind = "chat.completion" if chat else "text_completion"
        head = {"id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex, "created": int(time.time()), "model": served.name}
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            head["object"] = "chat.completion.chunk" if chat else kind
            return Stream(_events(job, head, chat, usage, counts), served, job)
        pieces: list[str] = []
        try:
            end = await wait(request, job, pieces.append)
        finally:
            served.engine.give_up(job)
            counts["made"] = len(job.growing.ids)
        text = "".join(pieces)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": end.reason}
        return JSONResponse({**head, "object": kind, "choices": [choice], "usage": _usage(end)})

    @routes.post("/v1/completions")
    async def completions(request: Request, asked: Completion) -> Any:
        job = await submitted(asked, lambda: prompted(asked.prompt), 16 if asked.max_tokens is None else asked.max_tokens)
        return await answered(request, asked, job, chat=False)

    @routes.post("/v1/chat/completions")
    async def chat(request: Request, asked: Chat) -> Any:
        job = await submitted(asked, lambda: rendered(asked.messages), asked.max_completion_tokens or asked.max_tokens)
        return await answered(request, asked, job, chat=True)

    @routes.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [about]}

    @routes.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        if name != served.name:
            raise Refused(404, f"there is no such model; there is '{served.name}'", "model_not_found", "model")
        return about

    return routes


async def _events(job: Writing, head: dict[str, Any], chat: bool, usage: bool, counts: dict[str, Any]) -> AsyncIterator[str]:
    """The answer as server-sent events. What goes wrong after the first byte can only be told as an event."""

    def event(said: str | None, reason: str | None = None, role: bool = False) -> str:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": reason}
        if chat:
            choice["delta"] = ({"role": "assistant"} if role else {}) | ({} if said is None else {"content": said})
        else:
            choice["text"] = said or ""
        return _line({**head, "choices": [choice], **({"usage": None} if usage else {})})

    if chat:
        yield event("", role=True)
    try:
        while not isinstance(piece := await job.event(), Done):
            yield event(piece)
        yield event(None, piece.reason)
        if usage:
            yield _line({**head, "choices": [], "usage": _usage(piece)})
        yield "data: [DONE]\n\n"
    except Refused as error:
        counts["error"] = error.status
        yield _line({"error": {"message": error.message, "type": "server_error", "param": None, "code": error.code}})
    finally:
        counts["made"] = len(job.growing.ids)


def _line(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _usage(end: Done) -> dict[str, int]:
    return {"prompt_tokens": end.prompt, "completion_tokens": end.made, "total_tokens": end.prompt + end.made}
