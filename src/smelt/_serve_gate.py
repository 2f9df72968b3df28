"""What every request passes before the application: host, token, kind and size of the body. And one line of log after it.

Nothing of a request but its method, its route, counts and times is logged: no header, no query, no body.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from typing import Any

from starlette.responses import JSONResponse

from smelt._serve_engine import Refused

__all__ = ["Gate", "refusal"]

log = logging.getLogger("smelt.serve")

READ = 30.0  # seconds for a whole body
DRAIN = 16  # times the limit that are read and dropped, so that the client gets to see the answer
TYPES = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def refusal(error: Refused) -> JSONResponse:
    """A refusal in OpenAI's shape."""
    kind = TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    message = error.message.encode("utf-8", "replace").decode()  # a lone surrogate that was sent cannot be sent back
    body = {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}
    return JSONResponse(body, error.status, error.headers)


class Gate:
    """ASGI around the application. `token` None: no key asked for. `hosts` None: any Host header.

    With the loopback as the only address, a Host header that names another machine comes from a web page that had its
    own name resolved to 127.0.0.1; and a body of another type than JSON is what a web page may send without asking.
    """

    def __init__(self, app: Any, *, body: int, token: bytes | None = None, hosts: frozenset[str] | None = None):
        self.app, self.body, self.token, self.hosts = app, body, token, hosts
        self.active = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 0
        counts: dict[str, Any] = {}
        scope["smelt"] = counts

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.active += 1
        try:
            try:
                self._enter(scope)
                receive = await self._read(scope, receive)
                await self.app(scope, receive, sending)
            except Refused as error:
                await refusal(error)(scope, receive, sending)
            except Exception as error:  # the message may quote the request
                log.error("%s in %s", type(error).__name__, _route(scope))
                if not status:
                    await refusal(Refused(500, f"internal error: {type(error).__name__}"))(scope, receive, sending)
        finally:
            self.active -= 1
            told = "".join(f" {name}={value}" for name, value in counts.items())
            log.info("%s %s %d %.2fs%s", scope["method"], _route(scope), status, time.monotonic() - began, told)

    def _enter(self, scope: Any) -> None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self.hosts is not None and host and host not in self.hosts and host.rsplit(":", 1)[0] not in self.hosts:
            raise Refused(400, "this server answers on the loopback only; the Host header names another machine", "wrong_host")
        if self.token is not None and scope["path"] != "/health":
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if not (hmac.compare_digest(given.strip(), self.token) and kind.lower() == b"bearer"):
                raise Refused(401, "a valid bearer token is needed", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["method"] in ("POST", "PUT", "PATCH"):
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refused(415, "the body must be JSON, with Content-Type: application/json", "wrong_content_type")

    async def _read(self, scope: Any, receive: Any) -> Any:
        """The whole body, at most `self.body` bytes of it, and a `receive` that hands it on."""
        length = dict(scope["headers"]).get(b"content-length", b"")
        promised = int(length) if length.isdigit() and len(length) < 20 else 0
        chunks, size, more = [], 0, promised <= DRAIN * self.body
        try:
            async with asyncio.timeout(READ):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the connection was cut inside the body")
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    more = message.get("more_body", False) and size <= DRAIN * self.body
                    if size <= self.body:
                        chunks.append(chunk)
                    else:
                        chunks.clear()
        except TimeoutError:
            raise Refused(408, f"the body did not arrive within {READ:.0f} s", "timeout", headers={"Connection": "close"}) from None
        if max(size, promised) > self.body:
            message = f"the body is larger than {self.body} bytes"
            raise Refused(413, message, "body_too_large", headers={"Connection": "close"})
        whole: bytes | None = b"".join(chunks)

        async def receiving() -> Any:
            nonlocal whole
            if whole is None:
                return await receive()
            body, whole = whole, None
            return {"type": "http.request", "body": body, "more_body": False}

        return receiving


def _route(scope: Any) -> str:
    """The route, not the path: what a stranger puts into a path is not logged."""
    return str(getattr(scope.get("route"), "path", "-"))
