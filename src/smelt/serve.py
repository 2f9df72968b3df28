"""`smelt serve MODEL`: a model with its runtime methods behind OpenAI's protocol.

What transformers serves with and what not. Where something is bound to the model (cache, attention, decoding) an answer is one
call of transformers' `generate`, so that it works as it does everywhere; chat templates, sampling and ends are
transformers' too. The server around it is FastAPI: `transformers serve` loads whatever model a request names, has no
bounds (queue, body, time), refuses by dropping fields, and logs more; and transformers' continuous batching writes its
own steps over its own paged cache, where no method of ours is called. (On one CPU core it also costs more than it saves:
16 prompts of 20 tokens, 32 more each, took 1.3 s, one padded batch 0.2 s; the tokens were the same.)

One thread owns the model (`_serve_engine.py`). Requests that decode plainly share one batch, whose rows come and go
(`_serve_flight.py`): greedy answers equal those alone up to ties of rounding. Where a method is bound, a request
brings a seed, or layers keep a state that padding would enter, they run one after another.

Rerank and embedding requests that wait together are one question to the judge or embedder (`_serve_rank.py`); a model without
a language head answers nothing else.

`ROUTERS` is what is served: each takes a `Ranked` (a `Served` that also ranks) and returns a FastAPI router.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import transformers
import uvicorn
from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from transformers.cache_utils import get_layer_types_and_kwargs

from smelt import _serve_openai, _serve_rank, registry, runtime
from smelt._serve_engine import Engine, Limits, Refused
from smelt._serve_gate import LOOPBACK, Gate, refusal
from smelt._serve_rank import Ranked
from smelt.model._load import Loaded
from smelt.progress import note
from smelt.spec import SmeltError

__all__ = ["ROUTERS", "TOKEN", "Limits", "application", "serve", "served", "token"]

TOKEN = "SMELT_TOKEN"  # the environment variable that holds the bearer token
ATTENDS = {"full_attention", "sliding_attention"}  # layers that see no padding
ROUTERS: list[Callable[[Ranked], APIRouter]] = [_serve_rank.router, _serve_openai.router]  # the first that has a path answers it

log = logging.getLogger("smelt.serve")


def token(file: Path | None = None) -> bytes | None:
    """The bearer token: the first line of the file, else the variable SMELT_TOKEN, else none."""
    if file is None:
        found = os.environ.get(TOKEN)
        if found is None:
            return None
        place = f"the variable {TOKEN}"
    else:
        place = str(file)
        try:
            found = file.read_text(encoding="utf-8").split("\n", 1)[0]
        except (OSError, UnicodeDecodeError) as error:
            raise SmeltError(f"the token cannot be read: {type(error).__name__}", file=place) from error
    found = found.strip()
    if not found or not found.isascii() or not found.isprintable() or " " in found:
        raise SmeltError(f"{place} holds no token: one word of printable ASCII is needed")
    return found.encode()


def served(
    model: Any,
    tokenizer: Any,
    name: str,
    limits: Limits = Limits(),  # noqa: B008
    alone: bool = False,
    rank: Any = None,
    folder: Any = None,
) -> Ranked:
    """A model ready to answer. `alone`: something is bound to it that decodes one text at a time. `rank`: the judge or strategy
    (recipe text or object) behind rerank and embeddings, else the one a trained judge's `folder` names, else the default."""
    ranking = _serve_rank.ranking(Loaded(model, tokenizer, folder), rank)
    config = model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or 1 << 20
    types, _ = get_layer_types_and_kwargs(config)
    alone = alone or not set(types) <= ATTENDS
    return Ranked(name, Engine(model, limits), tokenizer, context, alone, int(time.time()), limits, ranking)


def application(served: Ranked, *, key: bytes | None = None, local: bool = True, lifespan: Any = None) -> Gate:
    """The ASGI application. `local`: only Host headers that name the loopback are answered."""
    app = FastAPI(title="smelt", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    for make in ROUTERS:
        app.include_router(make(served))

    @app.get("/health")
    async def health() -> Any:
        engine = served.engine
        state = "stopping" if engine.stopping else "ok" if engine.alive else "failed"
        body = {"status": state, "waiting": engine.waiting, "running": len(engine.running)}
        return JSONResponse(body, 200 if state == "ok" else 503)

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> Any:
        return refusal(error)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Any:
        return refusal(Refused(error.status_code, str(error.detail), headers=dict(error.headers or {})))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Any:
        return refusal(_wrong(error))

    return Gate(app, body=served.limits.body, token=key, hosts=frozenset(LOOPBACK) if local else None)


def serve(
    model: str,
    *,
    cache: str | None = None,
    attention: str | None = None,
    decode: str | None = None,
    rank: str | None = None,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    token_file: Path | None = None,
    limits: Limits = Limits(),  # noqa: B008
    **options: Any,
) -> None:
    """Load, bind, listen; returns after SIGTERM or Ctrl-C, when running requests are finished. `options` go to `load`."""
    key = token(token_file)
    listening = _listen(host, port)
    try:
        logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
        log.setLevel(logging.INFO)
        transformers.utils.logging.set_verbosity_error()
        judge = registry.parse(rank, "rank") if rank else None  # a wrong name shows before weights are read
        methods = {kind: text for kind, text in (("cache", cache), ("attention", attention), ("decode", decode)) if text}
        loaded = runtime.load(model, **methods, **options)
        shown = name or (Path(model).resolve().name if Path(model).is_dir() else model)
        ready = served(loaded.model, loaded.tokenizer, shown, limits, alone=bool(methods), rank=judge, folder=loaded.folder)
        at, port = listening.getsockname()[:2]
        local = at in ("127.0.0.1", "::1")
        if not local and key is None:
            note(f"warning: anyone who reaches {at} can use this model; set {TOKEN} or --token-file")
        where = f"http://{'[' + at + ']' if ':' in at else at}:{port}/v1"
        server: list[uvicorn.Server] = []

        @asynccontextmanager
        async def lifespan(app: Any) -> AsyncIterator[None]:
            ending = asyncio.ensure_future(_stopped(server[0], ready.engine, gate))
            bound = methods | ({"rank": rank} if rank else {})
            note(f"serving '{shown}'" + "".join(f", {k}={v}" for k, v in bound.items()) + f" at {where}")
            yield
            ending.cancel()

        gate = application(ready, key=key, local=local, lifespan=lifespan)
        config = uvicorn.Config(
            gate, log_config=None, log_level="error", access_log=False, server_header=False, timeout_graceful_shutdown=2, lifespan="on"
        )
        server.append(uvicorn.Server(config))
        server[0].run(sockets=[listening])
        ready.engine.close()
    finally:
        listening.close()


async def _stopped(server: uvicorn.Server, engine: Engine, gate: Gate) -> None:
    """On the first signal refuse new work and let the running finish, as long as the limit says; on the second end at once."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()

    def signalled() -> None:
        if engine.stopping:
            server.force_exit = True
        engine.stopping = True
        told.set()

    try:
        for sign in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(sign, signalled)  # in the place of uvicorn's, which would close the door before a 503 gets out
    except (NotImplementedError, RuntimeError):  # Windows, or a server that is not in the main thread: uvicorn's stay
        return
    await told.wait()
    note("stopping: no new requests")
    until = time.monotonic() + engine.limits.stop
    while (gate.active or engine.waiting or engine.running) and time.monotonic() < until and not server.force_exit:
        await asyncio.sleep(0.05)
    await asyncio.to_thread(engine.close, 1.0)
    server.should_exit = True


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise SmeltError(f"--host {host}: no such address ({error.strerror or error})") from error
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind(address)
        listening.listen(2048)
    except OSError as error:
        listening.close()
        raise SmeltError(f"{host}:{port} cannot be listened on: {error.strerror or error}; --port takes another one") from error
    return listening


def _wrong(error: RequestValidationError) -> Refused:
    """The first thing wrong with a body, without the value that was sent."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"the body is not valid JSON: {first.get('ctx', {}).get('error', '')}".rstrip(": "), "invalid_json")
    path: list[str] = []
    message = str(first["msg"]).removeprefix("Value error, ")
    for part in first["loc"][1:]:
        if part == "str" or (isinstance(part, str) and not part.isidentifier()):  # pydantic names the types it tried, one error each
            message = "of no type or value that this field takes"
            break
        path.append(str(part)[:40])
    place = ".".join(path)
    return Refused(400, f"{place}: {message}" if place else message, param=place or None)
