"""Request ids where another HTTP server runs the application, such as Ray Serve's.

Serve adds a header with a request id to every response: that of the request, or a new one. So each request gets an id
of Afterword's form in front of Serve's code. An id that the client has sent is replaced: `afterword serve` ignores it.
"""

from __future__ import annotations

import secrets

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

HEADER = b"x-request-id"


def new_request_id() -> str:
    """A request id as OpenAI's servers write it."""
    return f"req_{secrets.token_hex(16)}"


class RequestIds:
    """ASGI middleware that gives each request an id of its own, as a header."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replace the header, and run the application."""
        if scope["type"] == "http":
            others = [each for each in scope["headers"] if each[0] != HEADER]
            scope = {**scope, "headers": [*others, (HEADER, new_request_id().encode())]}
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts in front of a replica's application (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`)."""
    return [Middleware(RequestIds)]
