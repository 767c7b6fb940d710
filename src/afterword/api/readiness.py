"""Whether requests are taken: the states of a server as clients and load balancers see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.engine.parent.model_manager import ModelManager

ServerState = Literal["starting", "ready", "degraded", "draining"]


@dataclass(slots=True)
class Readiness:
    """Set once, when the server is told to end. Owner: the command that runs it."""

    draining: bool = False

    def drain(self) -> None:
        """From now on load balancers are told to go elsewhere."""
        self.draining = True

    def state(self, models: ModelManager) -> ServerState:
        """What the server is at: with several models it is ready while it can answer for one, once all are there."""
        states = {managed_model.state for managed_model in models}
        if self.draining or "closed" in states:
            return "draining"
        if "starting" in states and models.keep_alive is None:
            return "starting"
        return "ready" if states & {"ready", "unloaded", "starting"} else "degraded"


STATE_REASONS: dict[ServerState, str | None] = {
    "starting": "The model is being loaded.",
    "ready": None,
    "degraded": "The engine is being replaced.",
    "draining": "The server is shutting down.",
}
"""Why requests are not answered now."""
