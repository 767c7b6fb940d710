"""Builds the HTTP response for an error: status, error object, and headers about retries."""

from __future__ import annotations

import secrets

from starlette.responses import Response

from afterword.api.responses import serialization
from afterword.errors import (
    AfterwordError,
    EngineFailure,
    LoadFailed,
    NonFiniteLogits,
    Overloaded,
    RateLimited,
    Unauthorized,
)

# seconds over which the retries of refused clients are spread, so that they do not all arrive at once
_RETRY_JITTER_SECONDS = 5


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
