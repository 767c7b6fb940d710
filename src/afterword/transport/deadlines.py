"""Whether a connection takes too long over what it is at. Pure: the time is an argument."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.transport.transport_limits import TransportLimits

Phase = Literal["idle", "head", "body", "upload", "answer", "rest"]
"""Between requests; reading a head; reading a body; reading one that may be long; all read, the answer is to come;
answered, the body still comes."""


@dataclass(slots=True)
class Deadlines:
    """Where one connection stands, since when. Owner: the connection.

    A body has to be whole in time, and to keep a rate from the first seconds on. What was written counts as taken
    when less of it is left, or nothing; for how long nothing was taken is known as exactly as `overdue` is asked often.
    """

    limits: TransportLimits
    since: float
    phase: Phase = "head"
    received: int = 0
    _unsent: int = 0
    _last_progress: float = 0.0

    def enter_phase(self, phase: Phase, now: float) -> None:
        """Begin another phase."""
        self.phase, self.since, self.received = phase, now, 0

    def overdue(self, now: float, unsent: int) -> Phase | Literal["stall"] | None:
        """Which limit has been passed, if any. `unsent`: bytes of answers that the reader has not taken yet."""
        if not unsent or unsent != self._unsent:
            self._unsent, self._last_progress = unsent, now
        if unsent and self.phase == "idle":
            self.since = now  # they are still reading
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
                kept = limits.body_grace + self.received / max(1, limits.body_rate)
                return min(limits.body_seconds if self.phase == "body" else limits.upload_seconds, kept)
            case "rest":
                return limits.rest_seconds
            case "answer":
                return float("inf")
