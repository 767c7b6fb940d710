"""Checks the API key of a request.

`ProtectedRoute` belongs to the matched route, so that the check never depends on the text of the path. All routes are
protected except the two for load balancers, the static pages and, with `--metrics-open`, `/metrics`.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from afterword.api.in_process_client import SCOPE_KEY
from afterword.api.middleware.quota import acquire_grant
from afterword.api.requests.request_context import RequestContext, request_context_of
from afterword.api.responses import rate_limit_headers
from afterword.api.service import Service
from afterword.errors import Unauthorized
from afterword.keys.key_registry import Grant, KeyRegistry

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


def mask_key(key: str) -> str:
    """The first 8 and last 4 characters; of a key of up to 12 or more than 256 characters, only asterisks."""
    if not 12 < len(key) <= 256:
        return "*" * min(len(key), 12)
    return key[:8] + "*" * (len(key) - 12) + key[-4:]
