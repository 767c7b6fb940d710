"""Limits as callers see them: the headers of every answer, and the refusals."""

from __future__ import annotations

from collections.abc import Sequence

from afterword.errors import RateLimited
from afterword.keys.rate_limiter import LimitExceeded, LimitStatus

_SECOND = 10**9
_HEADER_PARTS = ("limit", "remaining", "reset")
_NAMES = {
    "requests": "requests per min (RPM)",
    "tokens": "tokens per min (TPM)",
    "concurrent": "requests at the same time",
}

HEADERS = tuple(f"x-ratelimit-{what}-{limit}" for limit in ("requests", "tokens") for what in _HEADER_PARTS)
"""All that can be told of limits."""


def headers(standings: Sequence[LimitStatus]) -> dict[str, str]:
    """`x-ratelimit-*` of the limits that a key has."""
    return {
        f"x-ratelimit-{what}-{each.limit}": value
        for each in standings
        for what, value in zip(
            _HEADER_PARTS, (str(each.allowed), str(each.remaining), duration(each.full)), strict=True
        )
    }


def duration(nanoseconds: int) -> str:
    """Rounded up, and written as the API does: 0s, 20ms, 1s, 6m0s, 1h0m0s."""
    milliseconds = -(-nanoseconds // 10**6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, seconds = divmod(-(-milliseconds // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def rate_limit_error(refusal: LimitExceeded) -> RateLimited:
    """The error for a key that has reached a limit."""
    if refusal.limit == "quota":
        return RateLimited(
            f"You exceeded your current quota of {refusal.allowed} tokens: {refusal.remaining} are left and "
            f"this request "
            f"can use {refusal.wanted}. Ask whoever runs this server for more.",
            kind="insufficient_quota",
            code="insufficient_quota",
            retry_after=None,
        )
    told = f"Limit {refusal.allowed}, Used {refusal.allowed - refusal.remaining}, Requested {refusal.wanted}"
    wait = None if refusal.wait is None else retry_after_seconds(refusal.wait)
    advice = "Please send less at once." if wait is None else f"Please try again in {wait}s."
    return RateLimited(
        f"Rate limit reached on {_NAMES[refusal.limit]}: {told}. {advice}",
        kind="tokens" if refusal.limit == "tokens" else "requests",
        code="rate_limit_exceeded",
        retry_after=wait,
    )


def wrong_key_error(wait: int) -> RateLimited:
    """The error for an address that has tried too many wrong keys."""
    return RateLimited(
        f"Too many wrong API keys came from your address. Please try again in {retry_after_seconds(wait)}s.",
        kind="requests",
        code="rate_limit_exceeded",
        retry_after=retry_after_seconds(wait),
    )


def retry_after_seconds(nanoseconds: int) -> int:
    """Whole seconds, rounded up, and at least one: what Retry-After can say."""
    return max(1, -(-nanoseconds // _SECOND))
