"""What the endpoints serve: the models, the names they are served under, and the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from afterword.api.life import Life
from afterword.api.visit import Visit
from afterword.batch.manager import Manager
from afterword.config import Config
from afterword.engine.roster import Host, Roster
from afterword.engine.supervisor import Supervisor
from afterword.errors import ModelNotFound, Overloaded, RequestError
from afterword.keys.ring import Ring
from afterword.log import Lines
from afterword.metrics import Metrics
from afterword.traces import Traces


@dataclass(frozen=True, slots=True)
class Served:
    """A model that is loaded."""

    id: str
    engine: Supervisor


@dataclass(frozen=True, slots=True)
class Service:
    """Everything an endpoint may use. `models` are all that requests can name, loaded or not.

    `batches` is None where nobody can ask for any.
    """

    config: Config
    models: Roster
    ring: Ring = field(default_factory=Ring)
    log: Lines | None = None
    life: Life = field(default_factory=Life)
    metrics: Metrics = field(default_factory=Metrics)
    batches: Manager | None = None
    traces: Traces | None = None

    def host(self, model: str | None) -> Host:
        """The model of that name, whatever it is at. None or "" is the only one there is.

        Raises `ModelNotFound`, and `RequestError` where a name is needed.
        """
        if not model and len(self.models) > 1:
            names = ", ".join(host.id for host in self.models)
            raise RequestError(f"This server has several models; name one of them in 'model': {names}.", param="model")
        host = self.models.get(model) if model else next(iter(self.models))
        if host is None:
            raise ModelNotFound(model or "")
        return host

    async def enter(self, model: str | None, visit: Visit) -> Served:
        """The model of that name, loaded if need be; its engine is kept until the visit is over.

        Raises what `host` does, `Overloaded`, `WaitedTooLong` and `LoadFailed`.
        """
        host = self.host(model)
        engine = await self.models.enter(host)
        visit.on_close = lambda: self.models.leave(host)
        return Served(host.id, engine)

    def check_room(self) -> None:
        """To be asked before a request is read. Raises `Overloaded` if no model would take any."""
        problem = None
        for host in self.models:
            try:
                return self.models.check_room(host)
            except Overloaded as full:
                problem = problem or full
        assert problem is not None
        raise problem
