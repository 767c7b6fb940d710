"""API keys and their limits, request bodies, error responses, and the headers that every response has.

Every route checks the API key except the two for load balancers and the static pages. The check belongs to the matched
route and never depends on the text of the path.
"""

from __future__ import annotations

import ipaddress
import secrets
import time

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from afterword.api.in_process_client import SCOPE_KEY
from afterword.api.middleware import rate_limit_headers
from afterword.api.requests.request_context import CONTEXT_KEY, RequestContext, request_context_of
from afterword.api.responses import serialization
from afterword.api.service import Service
from afterword.errors import (
    AfterwordError,
    EngineFailure,
    LoadFailed,
    NonFiniteLogits,
    Overloaded,
    RateLimited,
    RequestError,
    Unauthorized,
)
from afterword.keys.key_registry import Account, Grant, KeyRegistry
from afterword.keys.rate_limiter import LimitExceeded
from afterword.observability.metrics import Metrics
from afterword.observability.request_log import RequestLog
from afterword.observability.traces import PARENT_HEADERS, Traces

# seconds over which the retries of refused clients are spread, so that they do not all arrive at once
_RETRY_JITTER_SECONDS = 5
_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


class ProtectedRoute(Route):
    """A route that checks the API key, if the server has keys, and the limits of its account, for every HTTP method."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `Unauthorized`, `RateLimited` and `Overloaded`, before any of the body is read."""
        service: Service = scope["app"].state.service
        request_context = request_context_of(scope)
        request_context.route = self.path
        if SCOPE_KEY in scope:
            request_context.in_process = True
            request_context.grant = (
                None
                if scope[SCOPE_KEY] is None
                else acquire_grant(service.key_registry, scope[SCOPE_KEY], request_context)
            )
        elif service.config.requires_key:
            request_context.grant = authenticate(
                service.key_registry, request_context, Headers(scope=scope).get("authorization", "")
            )

        async def close_then_send(message: Message) -> None:
            """Close the context before the last part of the body: the client may send its next request at once."""
            if message["type"] == "http.response.body" and not message.get("more_body"):
                request_context.close()
            await send(message)

        try:
            await super().handle(scope, receive, close_then_send)
        finally:
            request_context.close()


def authenticate(key_registry: KeyRegistry, request_context: RequestContext, authorization: str) -> Grant:
    """The grant for the key in an Authorization header.

    The error for a wrong key is the same for unknown, expired and revoked keys, and never contains the whole key. The
    lookup costs one hash of at most `max_head` bytes and comes first, so that a valid key never waits because of wrong
    keys from the same address. Raises `Unauthorized`, `RateLimited`, and `Overloaded` while the keys cannot be read.
    """
    text = bearer_token(authorization)
    if not text:
        raise Unauthorized(_NO_KEY)
    account = key_registry.find(text)
    if account is None:
        if wait := key_registry.record_wrong_key(request_context.peer):
            raise rate_limit_headers.wrong_key_error(wait)
        raise Unauthorized(f"Incorrect API key provided: {mask_key(text)}.", code="invalid_api_key")
    return acquire_grant(key_registry, account, request_context)


def bearer_token(authorization: str) -> str:
    """The API key in an Authorization header, or "" if there is none."""
    scheme, _, text = authorization.partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


def acquire_grant(key_registry: KeyRegistry, account: Account, request_context: RequestContext) -> Grant:
    """Count a request against the limits of its account. Raises `RateLimited`."""
    request_context.account = account.key.id  # for the log if the request is refused
    grant = key_registry.enter(account)
    if isinstance(grant, LimitExceeded):
        raise rate_limit_headers.rate_limit_error(grant)
    return grant


def reserve(request_context: RequestContext, tokens: int) -> None:
    """Charge an account the most tokens that its request can use. Raises `RateLimited`."""
    refusal = request_context.grant.reserve(tokens) if request_context.grant else None
    if refusal is not None:
        raise rate_limit_headers.rate_limit_error(refusal)


def mask_key(key: str) -> str:
    """The first 8 and last 4 characters; of a key of up to 12 or more than 256 characters, only asterisks."""
    if not 12 < len(key) <= 256:
        return "*" * min(len(key), 12)
    return key[:8] + "*" * (len(key) - 12) + key[-4:]


async def read_json(request: Request) -> bytes:
    """The bytes of a JSON body. Raises `RequestError` for another media type, a compressed or a too large body."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "The body must be JSON, and the request must have the header 'Content-Type: application/json'.", status=400
        )
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError("The body must not be compressed: send it without the header Content-Encoding.", status=415)
    limit: int = request.app.state.service.config.transport.max_body
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
    """At most 1,024 characters as a header value. All but visible ASCII and spaces become question marks."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:1024]).encode()


def error_response(problem: AfterwordError) -> Response:
    """The error object, with the headers that state whether and when to retry."""
    headers = {}
    if isinstance(problem, Overloaded):
        headers["retry-after"] = str(problem.retry_after + secrets.randbelow(_RETRY_JITTER_SECONDS))
    if isinstance(problem, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    if isinstance(problem, EngineFailure | LoadFailed | NonFiniteLogits):
        headers["x-should-retry"] = "false"
    if isinstance(problem, RateLimited):
        wait = problem.retry_after
        headers |= {"x-should-retry": "false"} if wait is None else {"retry-after": str(wait)}
    return Response(
        serialization.encode(serialization.error(problem)),
        problem.status,
        headers=headers,
        media_type="application/json",
    )


async def on_afterword_error(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, AfterwordError)
    request_context_of(request.scope).record_error(problem)
    return error_response(problem)


async def on_routing_error(request: Request, problem: Exception) -> Response:
    """The response for an unknown path or a method that the path does not have."""
    assert isinstance(problem, HTTPException)
    service: Service = request.app.state.service
    if account := service.key_registry.find(bearer_token(request.headers.get("authorization", ""))):
        # for the log only: the response does not depend on it
        request_context_of(request.scope).account = account.key.id
    if problem.status_code == 404:
        message = f"Unknown request URL: {request.method} {request.url.path[:128]}. Please check the URL for typos."
        return await on_afterword_error(request, RequestError(message, code="unknown_url", status=404))
    if problem.status_code == 405:
        allowed = ", ".join(methods_of(request))
        message = f"This path does not have the method {request.method}. Allowed: {allowed}."
        response = await on_afterword_error(request, RequestError(message, code="method_not_supported", status=405))
        response.headers["allow"] = allowed
        return response
    return await on_afterword_error(request, RequestError(problem.detail, status=problem.status_code))


def methods_of(request: Request) -> list[str]:
    """The sorted methods of all routes that match the path."""
    routes = [each for each in request.app.routes if isinstance(each, Route)]
    matching = [each for each in routes if each.path_regex.match(request.scope["path"])]
    return sorted({method for each in matching for method in each.methods or ()})


async def on_disconnect(_: Request, __: Exception) -> Response:
    """The client disconnected before its body was complete. Only the log shows this status."""
    return Response(status_code=499)


async def on_unexpected_error(request: Request, _: Exception) -> Response:
    """The response for a bug. The traceback goes to the log and not to the client."""
    problem = AfterwordError("The server had an error while processing your request. Sorry about that!")
    return await on_afterword_error(request, problem)


class RequestMiddleware:
    """Outermost middleware: adds the common headers to each response; logs, counts and traces each ended request."""

    def __init__(
        self, app: ASGIApp, request_log: RequestLog | None, metrics: Metrics, traces: Traces | None = None
    ) -> None:
        self._app = app
        self._log = request_log
        self._metrics = metrics
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Create the request context, run the application, then report the outcome."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_context = RequestContext(f"req_{secrets.token_hex(16)}", client_address(scope))
        scope[CONTEXT_KEY] = request_context

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                request_context.status = message["status"]
                MutableHeaders(scope=message).update(response_headers(request_context))
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception:
            request_context.record_bug()
            raise
        finally:
            route = getattr(scope.get("route"), "path", None)
            if self._log is not None and not request_context.is_routine:
                self._log.write(request_context.log_line(route))
            outcome = request_context.outcome(scope["method"], route)
            self._metrics.record_request(outcome)
            if self._traces is not None and not request_context.is_routine:
                headers = Headers(scope=scope)
                self._traces.record_request(
                    outcome, {name: headers[name] for name in PARENT_HEADERS if name in headers}
                )


def response_headers(request_context: RequestContext) -> dict[str, str]:
    """The headers that every response has, and those of the limits of its account."""
    return {
        "x-request-id": request_context.id,
        "openai-processing-ms": str(int((time.monotonic() - request_context.started_at) * 1000)),
        "openai-version": "2020-10-01",
        "x-content-type-options": "nosniff",
        **(rate_limit_headers.headers(request_context.grant.standing()) if request_context.grant else {}),
    }


def client_address(scope: Scope) -> str:
    """The client's IP address; "" if the server or a proxy states no valid one."""
    try:
        return str(ipaddress.ip_address((scope.get("client") or ("",))[0]))
    except ValueError:
        return ""
