"""What the endpoints serve: the engine, the name it is served under, and the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from afterword.api.life import Life, check_loaded
from afterword.config import Config
from afterword.engine.supervisor import Supervisor
from afterword.errors import ModelNotFound
from afterword.keys.ring import Ring
from afterword.log import Lines


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
    ring: Ring = field(default_factory=Ring)
    log: Lines | None = None
    life: Life = field(default_factory=Life)

    def find(self, model: str | None) -> Served:
        """The model of that name. None or "" is the one that is served. Raises `ModelNotFound` and `Overloaded`."""
        check_loaded(self.served.engine)
        if model and model != self.served.id:
            raise ModelNotFound(model)
        return self.served
