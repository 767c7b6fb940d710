"""Rate limit headers and errors."""

from __future__ import annotations

import pytest

from afterword.api.responses.rate_limit_headers import HEADERS, duration, headers, rate_limit_error
from afterword.keys.rate_limiter import LimitExceeded, LimitStatus

MS, SECOND = 10**6, 10**9


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [
        (0, "0s"),
        (1, "1ms"),
        (20 * MS, "20ms"),
        (999 * MS, "999ms"),
        (999 * MS + 1, "1s"),
        (SECOND, "1s"),
        (SECOND + 1, "2s"),
        (59 * SECOND, "59s"),
        (60 * SECOND, "1m0s"),
        (360 * SECOND, "6m0s"),
        (3600 * SECOND, "1h0m0s"),
        (3661 * SECOND, "1h1m1s"),
    ],
)
def test_durations_are_rounded_up_and_written_as_the_api_does(nanoseconds, text):
    assert duration(nanoseconds) == text


def test_every_limit_has_three_headers():
    both = headers([LimitStatus("requests", 60, 59, SECOND), LimitStatus("tokens", 1000, 0, 60 * SECOND)])
    assert set(both) == set(HEADERS)
    assert headers([LimitStatus("tokens", 1000, 0, 60 * SECOND)]) == {
        "x-ratelimit-limit-tokens": "1000",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "1m0s",
    }


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (LimitExceeded("requests", 60, 0, 1, 999), ("requests", "rate_limit_exceeded", 1)),
        (LimitExceeded("tokens", 60, 10, 20, 9_000_000_001), ("tokens", "rate_limit_exceeded", 10)),
        (LimitExceeded("tokens", 60, 60, 70, None), ("tokens", "rate_limit_exceeded", None)),
        (LimitExceeded("concurrent", 4, 0, 1, SECOND), ("requests", "rate_limit_exceeded", 1)),
        (LimitExceeded("quota", 60, 10, 20, None), ("insufficient_quota", "insufficient_quota", None)),
    ],
)
def test_a_rate_limit_error_names_the_limit_and_the_wait(refusal, expected):
    error = rate_limit_error(refusal)
    assert (error.type, error.code, error.retry_after) == expected
    assert error.status == 429
    assert str(refusal.allowed) in error.message
