"""Who may ask, and how much at once: before any request is looked at."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftkit.serving.jobs import Refusal
from peftkit.serving.responses import error_body

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OPEN = ("/", "/health")  # the page asks for the key itself
_BODY_SECONDS = 30.0  # for a client to send its request
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cache-Control": "no-store",
}


def refused(refusal: Refusal) -> JSONResponse:
    """The response to a request that is not answered."""
    headers = {} if refusal.retry_after is None else {"Retry-After": str(refusal.retry_after)}
    if refusal.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(refusal), refusal.status, headers)


class Guard:
    """Middleware: host, key, kind and size of a request; headers of every response.

    Args:
        app: what comes after.
        api_key: what clients must know; None: nothing.
        max_body_bytes: largest request.
        hosts: names that this server may be called by; none: any. Without a key a web page that its reader opens could
            otherwise ask in the reader's name, by a name of its own that leads here (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, api_key: str | None, max_body_bytes: int, hosts: Collection[str]) -> None:
        self._app, self._key, self._max_body_bytes, self._hosts = app, api_key, max_body_bytes, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or hand on with the whole body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._check(scope)
            async with asyncio.timeout(_BODY_SECONDS):
                body = await self._read(Headers(scope=scope), receive)
        except Refusal as refusal:
            await refused(refusal)(scope, receive, with_headers)
        except TimeoutError:
            await refused(Refusal(408, f"the request did not come within {_BODY_SECONDS:g} s", "timeout"))(
                scope, receive, with_headers
            )
        else:
            await self._app(scope, _replay(body, receive), with_headers)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts and _host_of(headers.get("host", "")) not in self._hosts:
            raise Refusal(
                403, "this server answers to its own name only: start it with an API key to change that", "wrong_host"
            )
        if scope["path"] not in _OPEN and self._key is not None:
            kind, _, given = headers.get("authorization", "").partition(" ")
            if kind.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self._key.encode()):
                raise Refusal(401, "an API key is needed, as `Authorization: Bearer KEY`", "invalid_api_key")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            raise Refusal(415, "requests are JSON: set `Content-Type: application/json`", "wrong_content_type")

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        limit = self._max_body_bytes
        too_large = Refusal(413, f"a request may have {limit} bytes", "too_large")
        if int(headers.get("content-length", "0")) > limit:
            raise too_large
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise too_large
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    parts: list[dict[str, Any]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return parts.pop() if parts else await receive()

    return replayed


def _host_of(value: str) -> str:
    """The host in `host:port`, without the brackets of an IPv6 address."""
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0].lower()
