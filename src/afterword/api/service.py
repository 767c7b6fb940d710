"""What the endpoints serve: the engine, the name it is served under, and the settings."""

from __future__ import annotations

from dataclasses import dataclass

from afterword.config import Config
from afterword.engine.supervisor import Supervisor
from afterword.errors import ModelNotFound


@dataclass(frozen=True, slots=True)
class Served:
    """A model that requests can name. `created` is in Unix seconds."""

    id: str
    created: int
    engine: Supervisor


@dataclass(frozen=True, slots=True)
class Service:
    """Everything an endpoint may use."""

    config: Config
    served: Served

    def find(self, model: str | None) -> Served:
        """The model of that name. None or "" is the one that is served. Raises `ModelNotFound`."""
        if model and model != self.served.id:
            raise ModelNotFound(model)
        return self.served
