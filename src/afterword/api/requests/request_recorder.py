"""The request recorder: collects what happens to one request, for its log line, its metrics and its trace span.

`RequestMiddleware` creates it for every request. It never holds a text from the client. The route is the pattern in the
route table, the model's name is that of the served model, and the user is a pseudonym.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import Scope

from afterword.completion.run import Usage
from afterword.errors import AfterwordError
from afterword.keys.key import TokenUsage
from afterword.keys.rate_limiter import LimitStatus
from afterword.observability.metrics import NO_ROUTE, CompletionOutcome, RequestOutcome

_encode = msgspec.json.Encoder().encode  # escapes control characters

RECORDER_KEY = "afterword.request_recorder"
REQUEST_ID_KEY = "afterword.request_id"
"""The key of a request's id in its ASGI scope, where the server in front of the application has chosen the id."""
"""The key of the ASGI scope that holds the request recorder."""


class RequestRecorder:
    """Records one request. Only the request's own tasks use it, all on the event loop's thread.

    `started_at`: seconds of `time.monotonic`. `in_process`: the request is a batch line and has no waiting client.
    """

    def __init__(self, request_id: str, peer: str, in_process: bool = False) -> None:
        self.id = request_id
        self.started_at = time.monotonic()
        self.peer = peer
        self._in_process = in_process
        self._route: str | None = None
        self._other_path: str | None = None
        self._account: str | None = None
        self._user: str | None = None
        self._model: str | None = None
        self._usage: TokenUsage | None = None
        self._finish: dict[int, str] = {}  # finish reasons by index of the choice
        self._n = self._choices = 0  # choices per prompt, and of all prompts together
        self._compute_started_at: float | None = None
        self._first_token_at: float | None = None
        self._status = 499  # unless a response starts before the client disconnects
        self._code: str | None = None
        self._error: str | None = None
        self._failed = False
        self.limits: tuple[LimitStatus, ...] = ()  # of the account whose limits refused the request

    @property
    def usage(self) -> TokenUsage | None:
        """The tokens computed; None if no computation has ended."""
        return self._usage

    @property
    def user(self) -> str | None:
        """The pseudonym of the user in the request."""
        return self._user

    # ---- events, in their order

    def record_route(self, route: str) -> None:
        self._route = route

    def record_other_path(self, path: str) -> None:
        """Record a path that no route has. The caller takes it from a fixed list, never from the client."""
        self._other_path = path

    def record_account(self, key: str) -> None:
        """Record the id of a valid API key, also if a limit refuses the request afterwards."""
        self._account = key

    def record_refusal(self, limits: tuple[LimitStatus, ...]) -> None:
        """Record the state of the limits of an account that refused the request, for the response's headers."""
        self.limits = limits

    def record_model(self, model: str) -> None:
        self._model = model

    def record_user(self, pseudonym: str | None) -> None:
        self._user = pseudonym

    def record_plan(self, n: int, prompts: int) -> None:
        """Record the choices per prompt and the number of prompts. From now on the request counts as a completion."""
        self._n, self._choices = n, n * prompts

    def record_compute_start(self) -> None:
        """Record that the engine has begun the prefill of one of the prompts."""
        self._compute_started_at = self._compute_started_at or time.monotonic()

    def record_choice(self, index: int, reason: str | None) -> None:
        """Record a delta of a choice. `reason`: its `finish_reason`, if this was the last delta."""
        self._first_token_at = self._first_token_at or time.monotonic()
        if reason is not None:
            self._finish[index] = reason

    def record_usage(self, usage: Usage) -> None:
        """Record the tokens computed, also when the request fails or the client disconnects."""
        self._usage = TokenUsage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    def record_status(self, status: int) -> None:
        """Record the HTTP status of the response that starts."""
        self._status = status

    def record_error(self, problem: AfterwordError) -> None:
        """Record an error that the client gets instead of the response or within a stream."""
        self._code, self._error, self._failed = problem.code, problem.type, problem.status >= 500

    def record_bug(self) -> None:
        """Record an unexpected exception, which may have ended a response that had started."""
        self._error, self._failed = self._error or AfterwordError.type, True

    # ---- reports, after the request

    @property
    def is_routine(self) -> bool:
        """Whether log and traces leave the request out: health checks, static files and CORS preflight requests."""
        return self._route is None and self._status in (200, 304)

    def outcome(self, method: str, route: str | None) -> RequestOutcome:
        """The values for metrics and traces, after the request. `route`: the matched route, protected or not."""
        return RequestOutcome(
            method=method,
            route=self._route or route or NO_ROUTE,
            status=self._status,
            error=self._code or self._error,
            failed=self._failed,
            in_process=self._in_process,
            seconds=time.monotonic() - self.started_at,
            completion=self._completion_outcome() if self._choices else None,
            key=self._account,
        )

    def _completion_outcome(self) -> CompletionOutcome:
        used = self._usage or TokenUsage()
        return CompletionOutcome(
            model=self._model or "",
            n=self._n,
            choices=self._choices,
            reasons=tuple(self._finish.values()),
            begun=None if self._compute_started_at is None else self._compute_started_at - self.started_at,
            first=None if self._first_token_at is None else self._first_token_at - self.started_at,
            prompt_tokens=used.prompt,
            generated_tokens=used.completion,
            cached_tokens=used.cached,
        )

    def log_line(self, route: str | None) -> bytes:
        """The JSON line for the request log. `route`: the matched route, protected or not."""
        used = self._usage or TokenUsage()
        fields: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "peer": self.peer,
            "key": self._account,
            "user": self._user,
            "route": self._route or route or self._other_path,
            "model": self._model,
            "status": self._status,
            "code": self._code,
            "finish": [self._finish[index] for index in sorted(self._finish)],
            "prompt_tokens": used.prompt,
            "generated_tokens": used.completion,
            "cached_tokens": used.cached,
            "first_ms": self._milliseconds_to(self._first_token_at),
            "total_ms": self._milliseconds_to(time.monotonic()),
        }
        return _encode(fields)

    def _milliseconds_to(self, moment: float | None) -> float | None:
        return None if moment is None else round((moment - self.started_at) * 1000, 1)


def recorder_of(scope: Scope) -> RequestRecorder:
    recorder: RequestRecorder = scope[RECORDER_KEY]
    return recorder
