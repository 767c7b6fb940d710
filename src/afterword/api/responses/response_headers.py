"""The headers that every response has, and texts as header values."""

from __future__ import annotations

import time

from afterword.api.requests.request_recorder import RequestRecorder
from afterword.api.responses import rate_limit_headers
from afterword.keys.key_registry import Grant


def response_headers(recorder: RequestRecorder, grant: Grant | None) -> dict[str, str]:
    """The headers that every response has, and those of the limits of its account, also if a limit refused it."""
    limits = grant.limit_status() if grant else recorder.limits
    return {
        "x-request-id": recorder.id,
        "openai-processing-ms": str(int((time.monotonic() - recorder.started_at) * 1000)),
        "openai-version": "2020-10-01",
        "x-content-type-options": "nosniff",
        **rate_limit_headers.headers(limits),
    }


def header_text(text: str) -> bytes:
    """At most 1,024 characters as a header value. All but visible ASCII and spaces become question marks."""
    return "".join(letter if " " <= letter <= "~" else "?" for letter in text[:1024]).encode()
