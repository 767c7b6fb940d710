"""What the endpoints serve: the models, the names they are served under, and the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from afterword.api.readiness import Readiness
from afterword.api.requests.request_context import RequestContext
from afterword.batch.manager import BatchManager
from afterword.config import Config
from afterword.engine.parent.model_manager import ManagedModel, ModelManager
from afterword.engine.parent.supervisor import Supervisor
from afterword.errors import ModelNotFound, Overloaded, RequestError
from afterword.keys.key_registry import KeyRegistry
from afterword.observability.metrics import Metrics
from afterword.observability.request_log import RequestLog
from afterword.observability.traces import Traces


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model that is loaded."""

    id: str
    engine: Supervisor


@dataclass(frozen=True, slots=True)
class Service:
    """Everything an endpoint may use. `models` are all that requests can name, loaded or not.

    `batches` is None where nobody can ask for any.
    """

    config: Config
    models: ModelManager
    key_registry: KeyRegistry = field(default_factory=KeyRegistry)
    request_log: RequestLog | None = None
    readiness: Readiness = field(default_factory=Readiness)
    metrics: Metrics = field(default_factory=Metrics)
    batches: BatchManager | None = None
    traces: Traces | None = None

    def managed_model(self, model: str | None) -> ManagedModel:
        """The model of that name, whatever it is at. None or "" is the only one there is.

        Raises `ModelNotFound`, and `RequestError` where a name is needed.
        """
        if not model and len(self.models) > 1:
            names = ", ".join(managed_model.id for managed_model in self.models)
            raise RequestError(f"This server has several models; name one of them in 'model': {names}.", param="model")
        managed_model = self.models.get(model) if model else next(iter(self.models))
        if managed_model is None:
            raise ModelNotFound(model or "")
        return managed_model

    async def acquire_model(self, model: str | None, request_context: RequestContext) -> ServedModel:
        """The model of that name, loaded if need be; its engine is kept until the visit is over.

        Raises what `managed_model` does, `Overloaded`, `QueueTimeout` and `LoadFailed`.
        """
        managed_model = self.managed_model(model)
        engine = await self.models.acquire(managed_model)
        request_context.on_close = lambda: self.models.release(managed_model)
        return ServedModel(managed_model.id, engine)

    def check_capacity(self) -> None:
        """To be asked before a request is read. Raises `Overloaded` if no model would take any."""
        problem = None
        for managed_model in self.models:
            try:
                return self.models.check_capacity(managed_model)
            except Overloaded as full:
                problem = problem or full
        assert problem is not None
        raise problem
