"""Whether requests are taken: the states of a server as clients and load balancers see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.engine.roster import Roster

State = Literal["starting", "ready", "degraded", "draining"]


@dataclass(slots=True)
class Life:
    """Set once, when the server is told to end. Owner: the command that runs it."""

    draining: bool = False

    def drain(self) -> None:
        """From now on load balancers are told to go elsewhere."""
        self.draining = True

    def state(self, models: Roster) -> State:
        """What the server is at: with several models it is ready while it can answer for one, once all are there."""
        states = {host.state for host in models}
        if self.draining or "closed" in states:
            return "draining"
        if "starting" in states and models.keep_alive is None:
            return "starting"
        return "ready" if states & {"ready", "unloaded", "starting"} else "degraded"


REASONS: dict[State, str | None] = {
    "starting": "The model is being loaded.",
    "ready": None,
    "degraded": "The engine is being replaced.",
    "draining": "The server is shutting down.",
}
"""Why requests are not answered now."""
