"""What stands before every route: key, size of the body, time for it to come, how many at once, and what is counted.

Plain ASGI, so that streams pass as they are. A body is read whole here (it is small, or refused), then handed on.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preconcert.serving.errors import ServiceError, clean
from preconcert.serving.metrics import Metrics
from preconcert.serving.settings import ServiceSettings

OPEN = frozenset({"/", "/health", "/ready", "/docs", "/openapi.json"})
"""Paths that ask for no key: they tell nothing about anybody. They take no body either, and none is waited for."""
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
"""Methods that are counted by name; clients may invent others."""
_LOG = logging.getLogger("preconcert.serving")


def error_body(error: ServiceError) -> bytes:
    """An error as it is sent."""
    return json.dumps({"error": {"type": error.type, "message": clean(str(error))}}).encode()


def error_headers(error: ServiceError) -> dict[str, str]:
    """And its headers."""
    headers = {"content-type": "application/json"}
    if error.retry_after is not None:
        headers["retry-after"] = str(error.retry_after)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


class Guard:
    """Wraps the application.

    Args:
        app: what is guarded.
        settings: limits.
        metrics: receives what is counted.
    """

    def __init__(self, app: ASGIApp, settings: ServiceSettings, metrics: Metrics) -> None:
        self.app = app
        self.settings = settings
        self.metrics = metrics
        self._running = 0
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, finished = time.perf_counter(), 0, False

        async def sending(message: Message) -> None:
            nonlocal status, finished
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)
            finished = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._answer(scope, receive, sending)
        except ServiceError as error:
            if not status:
                await _refuse(error, sending)
        except Exception:
            _LOG.exception("%s %s failed", scope["method"], scope["path"])
            if not status:
                await _refuse(ServiceError(500, "internal", "the service failed; its log says how"), sending)
        finally:
            if not finished:
                self.metrics.disconnects.inc()
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self.metrics.requests.labels(method, route, str(status or 499)).inc()
            self.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if scope["path"] in OPEN:
            rest = b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"
            await self._pass_on(scope, b"", receive, _closing(send) if rest else send)
            return
        self._check_key(headers.get(b"authorization", b""))
        if self._running >= self.settings.max_requests:
            raise ServiceError(
                503,
                "too_many_requests",
                f"{self.settings.max_requests} requests are being answered, which is the limit; try again",
                retry_after=self.settings.retry_after_s,
            )
        self._running += 1
        self.metrics.running.set(self._running)
        try:
            body = await self._body(headers, receive)
            if body is not None:
                await self._pass_on(scope, body, receive, send)
        finally:
            self._running -= 1
            self.metrics.running.set(self._running)

    async def _pass_on(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """To the application, with a body that is there."""
        given = False

        async def receiving() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, receiving, send)

    def _check_key(self, given: bytes) -> None:
        if self._key is None:
            return
        kind, _, key = given.partition(b" ")
        if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self._key):
            raise ServiceError(401, "unauthorized", "no key, or a wrong one: send `Authorization: Bearer KEY`")

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """All of it; None where the client went away."""
        limit = self.settings.max_body
        too_large = ServiceError(413, "body_too_large", f"a body of more than {limit} bytes, which is the limit")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:18]) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ServiceError(
                408, "slow_body", f"the body did not come within {self.settings.body_timeout_s:g} s"
            ) from None


def _closing(send: Send) -> Send:
    """The rest of the body is not read, so that nothing else can come on this connection."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await send(message)

    return sending


async def _refuse(error: ServiceError, send: Any) -> None:
    headers = [(key.encode(), value.encode()) for key, value in error_headers(error).items()]
    if error.status in (408, 413):  # the rest of the body is not read
        headers.append((b"connection", b"close"))
    body = error_body(error)
    headers.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
