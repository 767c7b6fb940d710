"""The objects that routes use: models, keys, metrics, batches and settings; and the lookup of a request's model."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from afterword.api.readiness import Readiness
from afterword.batch.manager import BatchManager
from afterword.completion.model_defaults import ModelDefaults
from afterword.config import Config
from afterword.engine.parent.managed_engine import ManagedEngine
from afterword.engine.parent.model_manager import ManagedModel, ModelManager
from afterword.errors import ModelNotFound, Overloaded, RequestError
from afterword.keys.key_registry import KeyRegistry
from afterword.observability.metrics import Metrics
from afterword.observability.request_log import RequestLog
from afterword.observability.traces import Traces


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A loaded model. `id`: the name by which requests select it."""

    id: str
    engine: ManagedEngine


@dataclass(frozen=True, slots=True)
class NamedModel:
    """A name that requests can use, its model, and the default values of request fields for this name."""

    name: str
    managed_model: ManagedModel
    defaults: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Service:
    """Everything that a route may use. `models`: all models that requests can name, loaded or not.

    `batches` is None in a replica: the folders of several replicas are separate.
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
        """The model with that name, loaded or not. None and "" select the only model that is no adapter.

        Raises `ModelNotFound`, and `RequestError` if the name is absent and the server has several such models.
        """
        if not model:
            only = self._only_model()
            if only is None:
                names = ", ".join(named_model.name for named_model in self.named_models())
                raise RequestError(
                    f"This server has several models. 'model' must name one of them: {names}.", param="model"
                )
            return only
        defaults = self._defaults(model)
        managed_model = self.models.get(defaults.model if defaults else model)
        if managed_model is None:
            raise ModelNotFound(model)
        return managed_model

    def named_model(self, name: str) -> NamedModel:
        """The model with that name. Raises `ModelNotFound`."""
        return NamedModel(name, self.managed_model(name), self.default_values(name))

    def named_models(self) -> list[NamedModel]:
        """All names that requests can use: those of the models, then further ones."""
        names = [managed_model.id for managed_model in self.models]
        names += [each.name for each in self.config.defaults if each.name not in names]
        return [self.named_model(name) for name in names]

    def default_values(self, model: Any) -> Mapping[str, Any]:
        """The default values for the value of a request's `model`; those of the only model if it is absent."""
        if not model and (only := self._only_model()):
            model = only.id
        defaults = self._defaults(model)
        return defaults.values if defaults else {}

    def _only_model(self) -> ManagedModel | None:
        """The model without an adapter; None if there are several."""
        bases = [managed_model for managed_model in self.models if managed_model.definition.parent is None]
        return bases[0] if len(bases) == 1 else None

    def _defaults(self, name: Any) -> ModelDefaults | None:
        return next((each for each in self.config.defaults if each.name == name), None)

    @asynccontextmanager
    async def use_model(self, model: str | None) -> AsyncIterator[ServedModel]:
        """The model with that name, loaded first if necessary. It stays loaded until the context manager exits.

        Raises the exceptions of `managed_model`, `Overloaded`, `QueueTimeout` and `LoadFailed`.
        """
        managed_model = self.managed_model(model)
        engine = await self.models.acquire(managed_model)
        try:
            yield ServedModel(model or managed_model.id, engine)
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
