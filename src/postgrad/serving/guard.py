"""Before a request is read: who asks, from where, and how much. Everything that fails here costs no model time."""

from __future__ import annotations

import asyncio
import hmac
from typing import TYPE_CHECKING, Any

from postgrad.serving.protocol import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK_NAMES = {"127.0.0.1", "localhost", "[::1]"}
OPEN_PATHS = {"/health"}


class Guard:
    """ASGI middleware that refuses in OpenAI's error form.

    Args:
        app: what is guarded.
        key: every path but ``/health`` asks for it as a bearer token; None: no key.
        loopback: the server listens on this machine alone. Then the Host header must name this machine, or else a page
            in a browser could reach the server under a name of its own that points here (DNS rebinding).
        max_body: bytes of a request's body.
        body_seconds: time for the body to arrive.
    """

    def __init__(self, app: ASGIApp, key: str | None, loopback: bool, max_body: int, body_seconds: float) -> None:
        self.app, self.loopback, self.max_body, self.body_seconds = app, loopback, max_body, body_seconds
        self._key = None if key is None else key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(reversed(scope["headers"]))  # the first of each name
        try:
            self._check_host(headers.get(b"host", b""))
            if scope["path"] not in OPEN_PATHS:
                self._check_key(headers.get(b"authorization", b""))
            body = b""
            if scope["method"] == "POST":
                _check_type(headers.get(b"content-type", b""))
                body = await self._body(headers.get(b"content-length", b""), receive)
        except ApiError as error:
            from starlette.responses import JSONResponse

            own = {**error.headers(), "Connection": "close"}  # what is left of the body is not read
            await JSONResponse(error.body(), error.status, headers=own)(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    def _check_host(self, host: bytes) -> None:
        if not self.loopback:
            return
        name = host.decode("latin-1").lower()
        without_port = name[: name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
        if without_port not in LOOPBACK_NAMES:
            raise ApiError(
                403, "the Host header does not name this machine: use http://127.0.0.1 or localhost", "wrong_host"
            )

    def _check_key(self, authorization: bytes) -> None:
        if self._key is None:
            return
        scheme, _, given = authorization.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            raise ApiError(401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", "invalid_api_key")

    async def _body(self, length: bytes, receive: Receive) -> bytes:
        too_large = ApiError(413, f"the request is larger than {self.max_body:,} bytes", "request_too_large")
        if length.isdigit() and int(length) > self.max_body:
            raise too_large
        body, more = bytearray(), True
        try:
            async with asyncio.timeout(self.body_seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(400, "the request ended early", "incomplete_request")
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self.max_body:
                        raise too_large
        except TimeoutError:
            raise ApiError(
                408, f"the request did not arrive within {self.body_seconds:g} s", "request_timeout"
            ) from None
        return bytes(body)


def _check_type(content_type: bytes) -> None:
    """Only JSON: a page in a browser cannot send it to another site without asking, and asking is not answered."""
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise ApiError(415, "send JSON: 'Content-Type: application/json'", "unsupported_media_type")


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection says."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        message: dict[str, Any] = {"type": "http.request", "body": body, "more_body": False}
        return message

    return replayed
