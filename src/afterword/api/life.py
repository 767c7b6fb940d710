"""Whether requests are taken: the states of a server as clients and load balancers see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from afterword.engine.supervisor import Supervisor
from afterword.errors import Overloaded

State = Literal["starting", "ready", "degraded", "draining"]


@dataclass(slots=True)
class Life:
    """Set once, when the server is told to end. Owner: the command that runs it."""

    draining: bool = False

    def drain(self) -> None:
        """From now on load balancers are told to go elsewhere."""
        self.draining = True

    def state(self, engine: Supervisor) -> State:
        """What the server is at."""
        if self.draining or engine.state == "closed":
            return "draining"
        if engine.state in ("starting", "ready"):
            return engine.state
        return "degraded"


REASONS: dict[State, str | None] = {
    "starting": "The model is being loaded.",
    "ready": None,
    "degraded": "The engine is being replaced.",
    "draining": "The server is shutting down.",
}
"""Why requests are not answered now."""


def check_loaded(engine: Supervisor) -> None:
    """Nothing can be said of a model that is not there yet. Raises `Overloaded`."""
    if engine.state == "starting":
        raise Overloaded("The model is being loaded. Please try again later.", code="loading", retry_after=5)
