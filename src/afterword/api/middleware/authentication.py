"""Checks the API key of a request.

`ProtectedRoute` belongs to the matched route, so that the check never depends on the text of the path. All routes are
protected except the two for load balancers, the static pages and, with `--metrics-open`, `/metrics`.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, aclosing

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from afterword.api.in_process_client import SCOPE_KEY
from afterword.api.middleware.quota import acquire_grant
from afterword.api.requests.request_context import CONTEXT_KEY, RequestContext
from afterword.api.requests.request_recorder import RequestRecorder, recorder_of
from afterword.api.responses import rate_limit_headers
from afterword.api.service import Service
from afterword.errors import Unauthorized
from afterword.keys.key_registry import Account, Grant, KeyRegistry

_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY)."
)


class ProtectedRoute(Route):
    """A route that checks the API key, if the server has keys, and the limits of its account, for every HTTP method."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises `Unauthorized`, `RateLimited` and `Overloaded`, before any of the body is read."""
        recorder = recorder_of(scope)
        recorder.record_route(self.path)
        async with aclosing(AsyncExitStack()) as resources:
            grant = _acquire(scope, recorder)
            if grant is not None:
                resources.callback(lambda: grant.close(recorder.usage, recorder.user))
            scope[CONTEXT_KEY] = RequestContext(grant, SCOPE_KEY in scope, recorder, resources)

            async def close_then_send(message: Message) -> None:
                """Release everything before the last part of the body: the client may send its next request at once."""
                if message["type"] == "http.response.body" and not message.get("more_body"):
                    await resources.aclose()
                await send(message)

            await super().handle(scope, receive, close_then_send)


def _acquire(scope: Scope, recorder: RequestRecorder) -> Grant | None:
    """The grant of the account of an in-process request or of the API key. None where none is needed."""
    service: Service = scope["app"].state.service
    if SCOPE_KEY in scope:
        account: Account | None = scope[SCOPE_KEY]
        return None if account is None else acquire_grant(service.key_registry, account, recorder)
    if service.config.requires_key:
        return authenticate(service.key_registry, recorder, Headers(scope=scope).get("authorization", ""))
    return None


def authenticate(key_registry: KeyRegistry, recorder: RequestRecorder, authorization: str) -> Grant:
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
        if wait := key_registry.record_wrong_key(recorder.peer):
            raise rate_limit_headers.wrong_key_error(wait)
        raise Unauthorized(f"Incorrect API key provided: {mask_key(text)}.", code="invalid_api_key")
    return acquire_grant(key_registry, account, recorder)


def bearer_token(authorization: str) -> str:
    """The API key in an Authorization header, or "" if there is none."""
    scheme, _, text = authorization.partition(" ")
    return text.strip() if scheme.lower() == "bearer" else ""


def mask_key(key: str) -> str:
    """The first 8 and last 4 characters; of a key of up to 12 or more than 256 characters, only asterisks."""
    if not 12 < len(key) <= 256:
        return "*" * min(len(key), 12)
    return key[:8] + "*" * (len(key) - 12) + key[-4:]
