"""Deadlines of one connection: how long each phase of a request may last. Pure: the current time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.transport.transport_limits import TransportLimits

Phase = Literal["idle", "head", "body", "upload", "response", "rest"]
"""What the connection does at the moment:

- `idle`: waits between two requests
- `head`: reads a request line and headers
- `body`: reads a body
- `upload`: reads the body of a file upload, which may take longer
- `response`: has read the whole request and waits for the end of the response
- `rest`: has sent the response and still reads the rest of the body
"""


@dataclass(slots=True)
class Deadlines:
    """The phase of one connection and the time at which it began. Owner: the `Connection`. Times are in seconds.

    A body must arrive within its limit and keep `body_rate` after the first `body_grace` seconds. The client has read
    something when fewer bytes are unsent than before, or none. A stall is measured as exactly as `overdue` is called
    often.
    """

    limits: TransportLimits
    since: float
    phase: Phase = "head"
    received: int = 0
    _unsent: int = 0
    _last_progress: float = 0.0

    def enter_phase(self, phase: Phase, now: float) -> None:
        self.phase, self.since, self.received = phase, now, 0

    def overdue(self, now: float, unsent: int) -> Phase | Literal["stall"] | None:
        """Which deadline has passed: the current phase, or "stall"; None if none has.

        `unsent`: bytes of responses that the client has not read yet.
        """
        if not unsent or unsent != self._unsent:
            self._unsent, self._last_progress = unsent, now
        if unsent and self.phase == "idle":
            self.since = now  # the client is still reading the response
        if now - self._last_progress > self.limits.stall_seconds:
            return "stall"
        return self.phase if now - self.since > self._allowed() else None

    def _allowed(self) -> float:
        limits = self.limits
        match self.phase:
            case "idle":
                return limits.idle_seconds
            case "head":
                return limits.head_seconds
            case "body" | "upload":
                due = limits.body_grace + self.received / max(1, limits.body_rate)
                return min(limits.body_seconds if self.phase == "body" else limits.upload_seconds, due)
            case "rest":
                return limits.rest_seconds
            case "response":
                return float("inf")
