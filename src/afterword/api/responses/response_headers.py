"""The headers that every response has, and texts as header values."""

from __future__ import annotations

import time

from afterword.api.requests.request_context import RequestContext
from afterword.api.responses import rate_limit_headers


def response_headers(request_context: RequestContext) -> dict[str, str]:
    """The headers that every response has, and those of the limits of its account."""
    return {
        "x-request-id": request_context.id,
        "openai-processing-ms": str(int((time.monotonic() - request_context.started_at) * 1000)),
        "openai-version": "2020-10-01",
        "x-content-type-options": "nosniff",
        **(rate_limit_headers.headers(request_context.grant.standing()) if request_context.grant else {}),
    }


def header_text(text: str) -> bytes:
    """At most 1,024 characters as a header value. All but visible ASCII and spaces become question marks."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:1024]).encode()
