"""What the model manager and the routes need of an engine, whether its worker is a child or it runs on replicas."""

from __future__ import annotations

from typing import Literal, Protocol

from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.protocol import Engine, Load, PassStats

EngineState = Literal["starting", "ready", "restarting", "failing", "closed"]
"""`restarting`: jobs wait for the next worker. `failing`: the worker crashed too often; jobs are refused until a worker
has loaded the model."""


class ManagedEngine(Engine, Protocol):
    """An engine that can be opened and closed, and says how it is."""

    engine_metrics: EngineMetrics

    @property
    def state(self) -> EngineState:
        """Whether jobs are computed."""
        ...

    @property
    def load(self) -> Load:
        """The numbers of running and of waiting samples."""
        ...

    @property
    def pass_stats(self) -> PassStats:
        """The statistics of the last forward pass and of the slots."""
        ...

    @property
    def pid(self) -> int | None:
        """The worker's process id, None if there is no worker on this machine."""
        ...

    @property
    def loaded(self) -> float:
        """The loaded share of the model, from 0 to 1."""
        ...

    @property
    def restarts(self) -> int:
        """How often the worker was replaced."""
        ...

    def check_capacity(self) -> None:
        """Raise `Overloaded` if no job would be accepted now."""
        ...

    async def open(self) -> None:
        """Load the model. Raises `SettingError` if that fails."""
        ...

    async def close(self) -> None:
        """End all jobs."""
        ...
