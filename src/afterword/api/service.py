"""The objects that routes use: models, keys, metrics, batches and settings; and the lookup of a request's model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from afterword.api.readiness import Readiness
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
    """A loaded model. `id`: the name by which requests select it."""

    id: str
    engine: Supervisor


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that a route may use. `models`: all models that requests can name, loaded or not.

    `batches` is None in a process that does not listen for connections.
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
        """The model with that name, loaded or not. None and "" select the only model of the server.

        Raises `ModelNotFound`, and `RequestError` if the name is absent and the server has several models.
        """
        if not model and len(self.models) > 1:
            names = ", ".join(managed_model.id for managed_model in self.models)
            raise RequestError(
                f"This server has several models. 'model' must name one of them: {names}.", param="model"
            )
        managed_model = self.models.get(model) if model else next(iter(self.models))
        if managed_model is None:
            raise ModelNotFound(model or "")
        return managed_model

    @asynccontextmanager
    async def use_model(self, model: str | None) -> AsyncIterator[ServedModel]:
        """The model with that name, loaded first if necessary. It stays loaded until the context manager exits.

        Raises the exceptions of `managed_model`, `Overloaded`, `QueueTimeout` and `LoadFailed`.
        """
        managed_model = self.managed_model(model)
        engine = await self.models.acquire(managed_model)
        try:
            yield ServedModel(managed_model.id, engine)
        finally:
            self.models.release(managed_model)

    def check_capacity(self) -> None:
        """Raises `Overloaded` if no model accepts requests. Routes call it before they read the body."""
        problem = None
        for managed_model in self.models:
            try:
                return self.models.check_capacity(managed_model)
            except Overloaded as full:
                problem = problem or full
        assert problem is not None
        raise problem
