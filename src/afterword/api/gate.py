"""Who may come in, and with how much: keys, body size, and the headers that every answer has.

Every route is guarded but the two that a load balancer asks; the check hangs on the matched route, never on the
path's text.
"""

from __future__ import annotations

import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afterword.api import wire
from afterword.config import Config, Keys
from afterword.errors import AfterwordError, Overloaded, RequestError, Unauthorized

_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


class GuardedRoute(Route):
    """A route that first asks for a key, if the server has any, whatever the method."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `Unauthorized` to those without one."""
        config: Config = scope["app"].state.service.config
        if config.keys.digests:
            scope["client_key"] = check_key(Headers(scope=scope).get("authorization", ""), config.keys)
        await super().handle(scope, receive, send)


def client(request: Request) -> str:
    """Who asks, as a name that tells nothing of the key; empty on a server without keys."""
    name: str = request.scope.get("client_key", "")
    return name


def check_key(authorization: str, keys: Keys) -> str:
    """The name of a known key. Raises `Unauthorized` for others, which are never quoted whole."""
    scheme, _, key = authorization.partition(" ")
    key = key.strip()
    if scheme.lower() != "bearer" or not key:
        raise Unauthorized(_NO_KEY)
    if not keys.allow(key):
        raise Unauthorized(f"Incorrect API key provided: {masked(key)}.", code="invalid_api_key")
    return Keys.digest(key).hex()[:16]


def masked(key: str) -> str:
    """The first 8 and last 4 characters; nothing of a short or a very long key."""
    if not 12 < len(key) <= 256:
        return "*" * min(len(key), 12)
    return key[:8] + "*" * (len(key) - 12) + key[-4:]


async def read_json(request: Request) -> bytes:
    """A JSON body. Raises `RequestError` if it is too large or is called something else."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "The body must be JSON and say so: set the header 'Content-Type: application/json'.", status=400
        )
    limit: int = request.app.state.service.config.max_body
    too_large = RequestError(f"The body is larger than {limit} bytes.", status=413)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise too_large
    return bytes(body)


def header_text(text: str) -> bytes:
    """A caller's words as a header value: visible ASCII and spaces, the rest as question marks."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:1024]).encode()


def answer_error(problem: AfterwordError) -> Response:
    """The error envelope with the headers that clients act on."""
    headers = {}
    if isinstance(problem, Overloaded):
        headers["retry-after"] = str(problem.retry_after)
    if isinstance(problem, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return Response(wire.encode(wire.error(problem)), problem.status, headers=headers, media_type="application/json")


async def on_problem(_: Request, problem: Exception) -> Response:
    """Errors that we raise on purpose."""
    assert isinstance(problem, AfterwordError)
    return answer_error(problem)


async def on_http(request: Request, problem: Exception) -> Response:
    """Errors of routing: unknown paths and methods."""
    assert isinstance(problem, HTTPException)
    if problem.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path[:128]}. Please check the URL for typos."
        return answer_error(RequestError(message, code="unknown_url", status=404))
    if problem.status_code == 405:
        allowed = (problem.headers or {}).get("Allow", "")
        message = f"Not allowed to {request.method} here. Allowed: {allowed}."
        response = answer_error(RequestError(message, code="method_not_supported", status=405))
        response.headers["allow"] = allowed
        return response
    return answer_error(RequestError(problem.detail, status=problem.status_code))


async def on_bug(_: Request, __: Exception) -> Response:
    """Anything else: ours. The traceback goes to the log, nothing of it to the caller."""
    return answer_error(AfterwordError("The server had an error while processing your request. Sorry about that!"))


class Labelled:
    """Outermost: gives every answer its request id and the time it took."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on; add headers to the start of the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, start = f"req_{secrets.token_hex(16)}", time.monotonic()

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = name
                headers["openai-processing-ms"] = str(int((time.monotonic() - start) * 1000))
                headers["openai-version"] = "2020-10-01"
                headers["x-content-type-options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, labelled)
