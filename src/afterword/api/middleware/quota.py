"""Counts requests and tokens against the limits and the quota of an account."""

from __future__ import annotations

from afterword.api.requests.request_context import RequestContext
from afterword.api.requests.request_recorder import RequestRecorder
from afterword.api.responses import rate_limit_headers
from afterword.keys.key_registry import Account, Grant, KeyRegistry
from afterword.keys.rate_limiter import LimitExceeded


def acquire_grant(key_registry: KeyRegistry, account: Account, recorder: RequestRecorder) -> Grant:
    """Count a request against the limits of its account. Raises `RateLimited`."""
    recorder.record_account(account.key.id)  # first, so that the log line of a refusal has it too
    grant = key_registry.admit(account)
    if isinstance(grant, LimitExceeded):
        recorder.record_refusal(key_registry.limit_status(account))
        raise rate_limit_headers.rate_limit_error(grant)
    return grant


def reserve(request_context: RequestContext, tokens: int) -> None:
    """Charge an account the most tokens that its request can use. Raises `RateLimited`."""
    refusal = request_context.grant.reserve(tokens) if request_context.grant else None
    if refusal is not None:
        raise rate_limit_headers.rate_limit_error(refusal)
