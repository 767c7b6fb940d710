"""The state of the server that `/ready` reports: starting, ready, degraded or draining."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.engine.parent.model_manager import ModelManager

ServerState = Literal["starting", "ready", "degraded", "draining"]


@dataclass(slots=True)
class Readiness:
    """Whether the server drains. The command that runs the server owns it and calls `drain` once, at the end."""

    draining: bool = False

    def drain(self) -> None:
        """From now on `/ready` returns 503, so that load balancers send requests elsewhere."""
        self.draining = True

    def state(self, models: ModelManager) -> ServerState:
        """The state for all models together.

        Without `--keep-alive`, the server is starting until every model has been loaded. Otherwise it is ready while at
        least one model can answer requests, loaded or not.
        """
        states = {managed_model.state for managed_model in models}
        if self.draining or "closed" in states:
            return "draining"
        if "starting" in states and models.keep_alive is None:
            return "starting"
        return "ready" if states & {"ready", "unloaded", "starting"} else "degraded"


STATE_REASONS: dict[ServerState, str | None] = {
    "starting": "The server is loading the model.",
    "ready": None,
    "degraded": "The server is restarting the worker process of the model.",
    "draining": "The server is shutting down.",
}
"""The reason in the body of `/ready` for each state."""
