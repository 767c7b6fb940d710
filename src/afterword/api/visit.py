"""What is known of one request while it lasts, and the line that is logged of it: who, what, how long; never a text.

Whatever a caller wrote is left out or stands here under another name: the route is ours, the model's name is the
served one's, the user is a pseudonym.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.types import Scope

from afterword.completion.run import Usage
from afterword.keys.key import Used
from afterword.keys.ring import Grant

_encode = msgspec.json.Encoder().encode  # escapes control characters


@dataclass(slots=True)
class Visit:
    """One request. Made by `gate.Labelled`, filled by whoever answers it; the request's own task owns it.

    `began` and `first`, when the first of an answer was there, are monotonic seconds. `status` stays 499 if the
    caller has left before the answer began.
    """

    id: str
    peer: str
    began: float = field(default_factory=time.monotonic)
    route: str | None = None
    grant: Grant | None = None
    user: str | None = None
    model: str | None = None
    used: Used | None = None
    finish: dict[int, str] = field(default_factory=dict)
    first: float | None = None
    status: int = 499
    code: str | None = None

    @property
    def key(self) -> str:
        """The id of the caller's key, which tells nothing of the key; empty on a server without keys."""
        return self.grant.key if self.grant else ""

    def use(self, usage: Usage) -> None:
        """What was computed, however it ended."""
        self.used = Used(usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)

    def finished(self, index: int, reason: str | None) -> None:
        """Something of a choice was there; `reason` if that was all of it."""
        self.first = self.first or time.monotonic()
        if reason is not None:
            self.finish[index] = reason

    def close(self) -> None:
        """The answer is over: settle what it used."""
        if self.grant is not None:
            self.grant.close(self.used, self.user)

    @property
    def routine(self) -> bool:
        """Whether nobody wants to read of it: health checks, and pages that ask whether they may ask."""
        return self.route is None and self.status == 200

    def line(self) -> bytes:
        """What is logged."""
        used = self.used or Used()
        facts: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "id": self.id,
            "peer": self.peer,
            "key": self.key or None,
            "user": self.user,
            "route": self.route,
            "model": self.model,
            "status": self.status,
            "code": self.code,
            "finish": [self.finish[index] for index in sorted(self.finish)],
            "prompt_tokens": used.prompt,
            "completion_tokens": used.completion,
            "cached_tokens": used.cached,
            "first_ms": self._since(self.first),
            "total_ms": self._since(time.monotonic()),
        }
        return _encode(facts)

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else round((moment - self.began) * 1000, 1)


def visit_of(scope: Scope) -> Visit:
    """The visit that a request is."""
    visit: Visit = scope["afterword.visit"]
    return visit
