"""What is known of one request while it lasts, and the line that is logged of it: who, what, how long; never a text.

Whatever a caller wrote is left out or stands here under another name: the route is ours, the model's name is the
served one's, the user is a pseudonym.
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


@dataclass(slots=True)
class RequestContext:
    """One request. Made by `authentication.RequestMiddleware`, filled by whoever answers it; the request's own task
    owns it.

    `account` is the id of the caller's key if it opens the server, also where nothing was granted. `in_process`: a row
    of a batch, for which nobody waits. `started_at`, `compute_started_at`, when anything of it was computed, and
    `first_token_at`, when the first of an answer was there, are monotonic seconds. `n` and `choices` are the plan's.
    `status` stays 499 if the caller has left before the answer began. `error` is the type of the error that was told,
    `code` its code;
    `failed`: it was not the caller's.
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
        """The id of the caller's key, which tells nothing of the key; empty without one that opens the server."""
        return self.grant.key if self.grant else self.account

    def set_plan(self, plan: Plan) -> None:
        """What is about to be computed."""
        self.n, self.choices = plan.n, plan.n * len(plan.prompts)

    def mark_compute_started(self) -> None:
        """A prompt of it has begun to be computed."""
        self.compute_started_at = self.compute_started_at or time.monotonic()

    def record_error(self, problem: AfterwordError) -> None:
        """The caller is told an error, instead of an answer or in the middle of one."""
        self.code, self.error, self.failed = problem.code, problem.type, problem.status >= 500

    def record_bug(self) -> None:
        """A bug, perhaps in the middle of an answer: nobody could be told."""
        self.error, self.failed = self.error or AfterwordError.type, True

    def record_usage(self, usage: Usage) -> None:
        """What was computed, however it ended."""
        self.used = TokenUsage(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    def record_choice(self, index: int, reason: str | None) -> None:
        """Something of a choice was there; `reason` if that was all of it."""
        self.first_token_at = self.first_token_at or time.monotonic()
        if reason is not None:
            self.finish[index] = reason

    def close(self) -> None:
        """The answer is over: settle what it used, and let go of the model. Once more changes nothing."""
        if self.closed:
            return
        self.closed = True
        if self.on_close is not None:
            self.on_close()
        if self.grant is not None:
            self.grant.close(self.used, self.user)

    @property
    def is_routine(self) -> bool:
        """Whether nobody wants to read of it: health checks, a page's files, pages that ask whether they may ask."""
        return self.route is None and self.status in (200, 304)

    def outcome(self, method: str, route: str | None) -> RequestOutcome:
        """What there is to count of it, now that it is over. `route` is where it came to, guarded or not."""
        return RequestOutcome(
            method=method,
            route=self.route or route or NO_ROUTE,
            status=self.status,
            error=self.code or self.error,
            failed=self.failed,
            in_process=self.in_process,
            seconds=time.monotonic() - self.started_at,
            completion=self._answer() if self.choices else None,
        )

    def _answer(self) -> CompletionOutcome:
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
        """What is logged. `route` is where it came to, guarded or not."""
        used = self.used or TokenUsage()
        facts: dict[str, Any] = {
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
            "first_ms": self._since(self.first_token_at),
            "total_ms": self._since(time.monotonic()),
        }
        return _encode(facts)

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else round((moment - self.started_at) * 1000, 1)


def request_context_of(scope: Scope) -> RequestContext:
    """The visit that a request is."""
    request_context: RequestContext = scope["afterword.visit"]
    return request_context
