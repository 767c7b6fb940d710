"""The request context: what the server records about one request for its log line, its metrics and its trace span.

It never holds a text from the client. The route is the pattern in the route table, the model's name is that of the
served model, and the user is a pseudonym.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import Scope

from afterword.completion.plan import Plan
from afterword.completion.run import Usage
from afterword.errors import AfterwordError
from afterword.keys.key import TokenUsage
from afterword.keys.key_registry import Grant
from afterword.observability.metrics import NO_ROUTE, CompletionOutcome, RequestOutcome

_encode = msgspec.json.Encoder().encode  # escapes control characters

CONTEXT_KEY = "afterword.request_context"
"""The key of the ASGI scope that holds the request context."""


@dataclass(slots=True)
class RequestContext:
    """Facts about one request. `RequestMiddleware` creates it, the route fills it, and only the request's task uses it.

    - `account`: the id of a valid API key, also if a limit refused the request.
    - `in_process`: the request is a batch line and has no waiting client.
    - `started_at`, `compute_started_at` (the first prefill began), `first_token_at`: seconds of `time.monotonic`.
    - `n`, `choices`: choices per prompt, and of all prompts together.
    - `status`: the HTTP status; it stays 499 if the client disconnects before the response starts.
    - `error`, `code`: type and code of the error that the client got. `failed`: the server caused it.
    """

    id: str
    peer: str
    started_at: float = field(default_factory=time.monotonic)
    route: str | None = None
    grant: Grant | None = None
    account: str = ""
    in_process: bool = False
    user: str | None = None
    model: str | None = None
    used: TokenUsage | None = None
    finish: dict[int, str] = field(default_factory=dict)
    n: int = 0
    choices: int = 0
    compute_started_at: float | None = None
    first_token_at: float | None = None
    status: int = 499
    code: str | None = None
    error: str | None = None
    failed: bool = False
    on_close: Callable[[], None] | None = None
    closed: bool = False

    @property
    def key(self) -> str:
        """The id of the API key, from which the key cannot be derived; "" without a valid key."""
        return self.grant.key if self.grant else self.account

    def set_plan(self, plan: Plan) -> None:
        self.n, self.choices = plan.n, plan.n * len(plan.prompts)

    def mark_compute_started(self) -> None:
        """Record that the engine has begun the prefill of one of the prompts."""
        self.compute_started_at = self.compute_started_at or time.monotonic()

    def record_error(self, problem: AfterwordError) -> None:
        """Record an error that the client gets instead of the response or within a stream."""
        self.code, self.error, self.failed = problem.code, problem.type, problem.status >= 500

    def record_bug(self) -> None:
        """Record an unexpected exception, which may have ended a response that had started."""
        self.error, self.failed = self.error or AfterwordError.type, True

    def record_usage(self, usage: Usage) -> None:
        """Record the tokens computed, also when the request fails or the client disconnects."""
        self.used = TokenUsage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    def record_choice(self, index: int, reason: str | None) -> None:
        """Record a delta of a choice. `reason`: its `finish_reason`, if this was the last delta."""
        self.first_token_at = self.first_token_at or time.monotonic()
        if reason is not None:
            self.finish[index] = reason

    def close(self) -> None:
        """Release the model and charge the account for the tokens used. Further calls do nothing."""
        if self.closed:
            return
        self.closed = True
        if self.on_close is not None:
            self.on_close()
        if self.grant is not None:
            self.grant.close(self.used, self.user)

    @property
    def is_routine(self) -> bool:
        """Whether log and traces leave the request out: health checks, static files and CORS preflight requests."""
        return self.route is None and self.status in (200, 304)

    def outcome(self, method: str, route: str | None) -> RequestOutcome:
        """The values for metrics and traces, after the request. `route`: the matched route, protected or not."""
        return RequestOutcome(
            method=method,
            route=self.route or route or NO_ROUTE,
            status=self.status,
            error=self.code or self.error,
            failed=self.failed,
            in_process=self.in_process,
            seconds=time.monotonic() - self.started_at,
            completion=self._completion_outcome() if self.choices else None,
        )

    def _completion_outcome(self) -> CompletionOutcome:
        used = self.used or TokenUsage()
        return CompletionOutcome(
            model=self.model or "",
            n=self.n,
            choices=self.choices,
            reasons=tuple(self.finish.values()),
            begun=None if self.compute_started_at is None else self.compute_started_at - self.started_at,
            first=None if self.first_token_at is None else self.first_token_at - self.started_at,
            prompt_tokens=used.prompt,
            generated_tokens=used.completion,
            cached_tokens=used.cached,
        )

    def log_line(self, route: str | None) -> bytes:
        """The JSON line for the request log. `route`: the matched route, protected or not."""
        used = self.used or TokenUsage()
        fields: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "peer": self.peer,
            "key": self.key or None,
            "user": self.user,
            "route": self.route or route,
            "model": self.model,
            "status": self.status,
            "code": self.code,
            "finish": [self.finish[index] for index in sorted(self.finish)],
            "prompt_tokens": used.prompt,
            "generated_tokens": used.completion,
            "cached_tokens": used.cached,
            "first_ms": self._milliseconds_to(self.first_token_at),
            "total_ms": self._milliseconds_to(time.monotonic()),
        }
        return _encode(fields)

    def _milliseconds_to(self, moment: float | None) -> float | None:
        return None if moment is None else round((moment - self.started_at) * 1000, 1)


def request_context_of(scope: Scope) -> RequestContext:
    request_context: RequestContext = scope[CONTEXT_KEY]
    return request_context
