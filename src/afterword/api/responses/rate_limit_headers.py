"""The `x-ratelimit-*` headers of a response, and the errors for requests beyond a limit."""

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

HEADERS = tuple(f"x-ratelimit-{part}-{limit}" for limit in ("requests", "tokens") for part in _HEADER_PARTS)
"""The names of all headers about limits."""


def headers(statuses: Sequence[LimitStatus]) -> dict[str, str]:
    """The headers for the limits that an account has; limits that it does not have are absent."""
    return {
        f"x-ratelimit-{part}-{status.limit}": value
        for status in statuses
        for part, value in zip(
            _HEADER_PARTS, (str(status.allowed), str(status.remaining), duration(status.time_until_full)), strict=True
        )
    }


def duration(nanoseconds: int) -> str:
    """A duration in OpenAI's format, rounded up: 0s, 20ms, 1s, 6m0s, 1h0m0s."""
    milliseconds = -(-nanoseconds // 10**6)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, seconds = divmod(-(-milliseconds // 1000), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{seconds}s" if hours else f"{minutes}m{seconds}s" if minutes else f"{seconds}s"


def rate_limit_error(refusal: LimitExceeded) -> RateLimited:
    """The error for a request that would exceed a limit of its account."""
    if refusal.limit == "quota":
        return RateLimited(
            f"You exceeded your current quota of {refusal.allowed} tokens: {refusal.remaining} are left, and this "
            f"request can use {refusal.wanted}. Ask the server's operator for a larger quota.",
            kind="insufficient_quota",
            code="insufficient_quota",
            retry_after=None,
        )
    figures = f"Limit {refusal.allowed}, Used {refusal.allowed - refusal.remaining}, Requested {refusal.wanted}"
    wait = None if refusal.wait is None else retry_after_seconds(refusal.wait)
    advice = (
        "The request alone is larger than the limit: please send a smaller one."
        if wait is None
        else f"Please try again in {wait}s."
    )
    return RateLimited(
        f"Rate limit reached on {_NAMES[refusal.limit]}: {figures}. {advice}",
        kind="tokens" if refusal.limit == "tokens" else "requests",
        code="rate_limit_exceeded",
        retry_after=wait,
    )


def wrong_key_error(wait: int) -> RateLimited:
    """The error for an address that sent too many wrong keys. `wait`: nanoseconds until the next attempt."""
    return RateLimited(
        f"Too many wrong API keys came from your address. Please try again in {retry_after_seconds(wait)}s.",
        kind="requests",
        code="rate_limit_exceeded",
        retry_after=retry_after_seconds(wait),
    )


def retry_after_seconds(nanoseconds: int) -> int:
    """Whole seconds for the header Retry-After: rounded up, at least 1."""
    return max(1, -(-nanoseconds // _SECOND))
