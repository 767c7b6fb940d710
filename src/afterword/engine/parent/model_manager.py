"""Loads and unloads the models of one server. Each loaded model has its own engine with its own worker process.

The model manager owns all engines; the event loop's thread owns its state. A request acquires a model and releases it,
and in between its engine is not closed.

- Without `keep_alive` all models are loaded at the start and stay loaded.
- With `keep_alive` the first request for a model loads it, and later requests wait until it is loaded. The engine is
  closed after `keep_alive` seconds without use, or earlier if another model needs the memory.
- Models can be added and removed later (adapters). A model that was removed has no name any more. Its engine is closed
  when the last request that uses it has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.parent.job_queue import DEFAULT_POLICY, OVERLOADED, QueuePolicy
from afterword.engine.parent.managed_engine import EngineState, ManagedEngine
from afterword.engine.protocol import Load, ModelInfo, Promise
from afterword.errors import AfterwordError, LoadFailed, Overloaded, QueueTimeout
from afterword.system.tasks import TaskFunction, run_logged

ModelState = EngineState | Literal["unloaded"]
"""`starting`: the model is being loaded, or waits for another load to end."""


_LOADING = "The model is being loaded. Please try again later."
_NO_MEMORY = "The memory that this model needs is in use for other models. Please try again later."
_SHUTTING_DOWN = "The server is shutting down."
_log = logging.getLogger("afterword")


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    """The facts about a model that are known before it is loaded.

    - `created`: Unix time in seconds.
    - `context`: tokens of one sequence; `sequences`: how many sequences the engine has; `capacity`: the most tokens of
      all of them together, None if every one can be full. 0 for context and sequences if only the engine knows them.
    - `trained_context`: tokens that the model was trained on; 0 if unknown.
    - `memory_bytes`: memory that the loaded model needs.
    - `make_engine`: returns an engine that is not open yet.
    - `advice`: a sentence for the operator.
    - `parent`: the model to which this one adds an adapter.
    """

    id: str
    created: int
    make_engine: Callable[[], ManagedEngine]
    context: int = 0
    sequences: int = 0
    capacity: int | None = None
    trained_context: int = 0
    promise: Promise = "none"
    memory_bytes: int = 0
    advice: str | None = None
    parent: str | None = None


DefineAdapter = Callable[[str, Path, int], ModelDefinition]


class ManagedModel:
    """A model and its current engine. Only the model manager changes it."""

    def __init__(self, definition: ModelDefinition, *, always_loaded: bool = True) -> None:
        self.definition = definition
        self.engine: ManagedEngine | None = None
        self.last_model_info: ModelInfo | None = None  # from the last engine that was closed
        self.engine_metrics = EngineMetrics()  # shared by one engine after the other
        self.users = 0  # acquired and not released
        self.waiting = 0  # requests that wait until the model is loaded
        self.last_used = 0  # a counter that orders models by their last use
        self.loading: asyncio.Task[AfterwordError | None] | None = None
        self.unload_timer: asyncio.TimerHandle | None = None
        self.removed = False
        self._always_loaded = always_loaded

    @property
    def id(self) -> str:
        """The model's name in requests."""
        return self.definition.id

    @property
    def state(self) -> ModelState:
        if self.engine is not None:
            return self.engine.state
        return "starting" if self._always_loaded or self.loading else "unloaded"

    @property
    def load(self) -> Load:
        """The engine's load; requests that wait until the model is loaded count as waiting."""
        load = self.engine.load if self.engine else Load()
        return msgspec.structs.replace(load, waiting=load.waiting + self.waiting) if self.waiting else load

    @property
    def restarts(self) -> int:
        """How often the worker of the current engine was replaced."""
        return self.engine.restarts if self.engine else 0

    @property
    def model_info(self) -> ModelInfo | None:
        """The model info of the current engine, or else of the last engine that had loaded the model."""
        return self.loaded_engine.model_info if self.loaded_engine else self.last_model_info

    @property
    def shape(self) -> ModelInfo | ModelDefinition:
        """Context, sequences and capacity: those of the engine, or else the planned ones."""
        return self.model_info or self.definition

    @property
    def promise(self) -> Promise:
        """The promise of the last engine that loaded the model; before the first load the best possible promise."""
        return self.model_info.promise if self.model_info else self.definition.promise

    @property
    def loaded_engine(self) -> ManagedEngine | None:
        """The current engine, if it has loaded the model."""
        return self.engine if self.engine and self.engine.state != "starting" else None


class ModelManager:
    """All models of a server, in the order of the command line. All methods are called on the event loop's thread.

    `free` returns the bytes of memory that are available at the moment. `define_adapter`: makes the definition of a
    further model from its name, an adapter's file and the bytes of memory that it may use; it reads files, and raises
    `SettingError`. None: the models have no adapters.
    """

    def __init__(
        self,
        definitions: Sequence[ModelDefinition],
        *,
        keep_alive: float | None = None,
        policy: QueuePolicy = DEFAULT_POLICY,
        free: Callable[[], int] = lambda: 2**63,
        define_adapter: DefineAdapter | None = None,
    ) -> None:
        self.keep_alive = keep_alive
        self.define_adapter = define_adapter
        self._models = {each.id: ManagedModel(each, always_loaded=keep_alive is None) for each in definitions}
        self.policy = policy
        self._free = free
        self._budget = free()
        self._use_counter = itertools.count(1)
        self._transition = asyncio.Lock()  # one load or unload at a time
        self._transitions: set[asyncio.Task[None]] = set()
        self._adding: dict[str, asyncio.Task[None]] = {}  # by the name of a model that is not served yet
        self._removed: set[ManagedModel] = set()  # with an engine that is not closed yet
        self._closed = False

    def __iter__(self) -> Iterator[ManagedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> ManagedModel | None:
        """The model of that name, None if there is none."""
        return self._models.get(name)

    # ---- start and shutdown

    async def open(self) -> None:
        """Load all models, unless `keep_alive` is set. Raises `SettingError` if that fails."""
        if self.keep_alive is None:
            for managed_model in self:
                async with self._transition:
                    await self._start(managed_model)

    async def close(self) -> None:
        """Cancel loads and close every engine with its jobs."""
        self._closed = True
        every = (*self, *self._removed)
        for managed_model in every:
            self._cancel_unload_timer(managed_model)
        loading = [*self._adding.values(), *(each.loading for each in every if each.loading)]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await asyncio.gather(*self._transitions)
        await asyncio.gather(*(managed_model.engine.close() for managed_model in every if managed_model.engine))

    # ---- models that come and go

    def has(self, name: str) -> bool:
        """Whether a model has this name, or one that is being added."""
        return name in self._models or name in self._adding

    @property
    def adapters(self) -> int:
        """How many models are adapters, with those that are being added and those that requests still use."""
        return sum(each.definition.parent is not None for each in (*self, *self._removed)) + len(self._adding)

    async def add(self, name: str, define: Callable[[int], Awaitable[ModelDefinition]]) -> None:
        """Load a further model, which is served from then on. If that fails, nothing has changed.

        `define` is called with the bytes of memory that the model may use. The model is loaded even if the
        caller is cancelled. Raises `Overloaded`, and `SettingError` if the model cannot be loaded.
        """
        if self._closed:
            raise Overloaded(_SHUTTING_DOWN)
        self._adding[name] = task = asyncio.create_task(self._add(name, define))
        task.add_done_callback(lambda ended: self._adding.pop(name) and (ended.cancelled() or ended.exception()))
        await asyncio.wait({task})
        if task.cancelled():
            raise Overloaded(_SHUTTING_DOWN)
        task.result()

    async def _add(self, name: str, define: Callable[[int], Awaitable[ModelDefinition]]) -> None:
        async with self._transition:
            available = self._available_memory() if self.keep_alive is None else self._budget
            managed_model = ManagedModel(await define(available), always_loaded=self.keep_alive is None)
            if self.keep_alive is not None:
                await self._free_memory(managed_model)
            await self._start(managed_model)
            self._models[name] = managed_model
        self._start_unload_timer(managed_model)

    def remove(self, managed_model: ManagedModel) -> None:
        """Serve a model no longer. Requests that use it continue, and its engine is closed after the last of them."""
        del self._models[managed_model.id]
        managed_model.removed = True
        self._removed.add(managed_model)
        self._start_unload_timer(managed_model)

    async def _close_removed(self, managed_model: ManagedModel) -> None:
        async with self._transition:
            if not managed_model.users:
                await self._unload(managed_model)
                self._removed.discard(managed_model)

    # ---- use of a model

    async def acquire(self, managed_model: ManagedModel) -> ManagedEngine:
        """Load the model if needed and return its engine, which is not closed before `release`.

        Raises `Overloaded`, `QueueTimeout` and `LoadFailed`; after an exception the caller must not call `release`.
        """
        if self._closed:
            raise Overloaded(_SHUTTING_DOWN)
        managed_model.users += 1
        self._cancel_unload_timer(managed_model)
        try:
            return managed_model.loaded_engine or await self._loaded(managed_model)
        except BaseException:
            self.release(managed_model)
            raise

    def release(self, managed_model: ManagedModel) -> None:
        """End the use of a model. Call it once for each successful `acquire`."""
        managed_model.users -= 1
        managed_model.last_used = next(self._use_counter)
        self._start_unload_timer(managed_model)

    def check_started(self) -> None:
        """Raise `Overloaded` while a model that is loaded at the start is not loaded yet."""
        for managed_model in self if self.keep_alive is None else ():
            self.check_loaded(managed_model)

    def check_loaded(self, managed_model: ManagedModel, unloaded: str = _LOADING) -> ManagedEngine:
        """The model's engine. Raises `Overloaded` if it is not loaded.

        `unloaded`: the message of that error if the model is not being loaded either.
        """
        if managed_model.loaded_engine is None:
            raise Overloaded(unloaded if managed_model.state == "unloaded" else _LOADING, code="loading", retry_after=5)
        return managed_model.loaded_engine

    def check_capacity(self, managed_model: ManagedModel) -> None:
        """Raise `Overloaded` if no job would be accepted now. Call it before any work is done for a request."""
        if self._closed:
            raise Overloaded(_SHUTTING_DOWN)
        if managed_model.loaded_engine or self.keep_alive is None:
            self.check_loaded(managed_model).check_capacity()
        elif managed_model.waiting >= self.policy.queue:
            raise Overloaded(OVERLOADED)

    async def _loaded(self, managed_model: ManagedModel) -> ManagedEngine:
        """Load the model, or wait until a load in progress ends, for at most `queue_seconds`."""
        self.check_capacity(managed_model)
        managed_model.loading = managed_model.loading or asyncio.create_task(self._load(managed_model))
        managed_model.waiting += 1
        try:
            done, _ = await asyncio.wait({managed_model.loading}, timeout=self.policy.queue_seconds or None)
        finally:
            managed_model.waiting -= 1
        if not done:
            raise QueueTimeout()
        (task,) = done
        problem = Overloaded(_SHUTTING_DOWN) if task.cancelled() else task.result()
        if problem is not None:
            raise problem
        assert managed_model.engine is not None
        return managed_model.engine

    # ---- loading and unloading

    async def _load(self, managed_model: ManagedModel) -> AfterwordError | None:
        """Load a model, and unload others if it needs their memory. Returns the error for the waiting requests."""
        try:
            async with self._transition:
                await self._free_memory(managed_model)
                await self._start(managed_model)
        except Overloaded as problem:
            return problem
        except (AfterwordError, OSError) as problem:
            _log.warning("The model %s could not be loaded: %s", managed_model.id, problem)
            return LoadFailed(managed_model.id)
        except Exception:
            _log.exception("The model %s could not be loaded", managed_model.id)
            return LoadFailed(managed_model.id)
        finally:
            managed_model.loading = None
            self._start_unload_timer(managed_model)  # all waiting clients may have disconnected
        return None

    async def _start(self, managed_model: ManagedModel) -> None:
        managed_model.engine = engine = managed_model.definition.make_engine()
        engine.engine_metrics = managed_model.engine_metrics
        try:
            await engine.open()
        except BaseException:
            await self._unload(managed_model)
            raise

    async def _free_memory(self, wanted: ManagedModel) -> None:
        """Unload idle models, the least recently used first, until `wanted` fits.

        Raises `Overloaded` if the remaining models are all in use.
        """
        while wanted.definition.memory_bytes > self._available_memory():
            idle = [managed_model for managed_model in self if managed_model.engine and not _busy(managed_model)]
            if not idle:
                raise Overloaded(_NO_MEMORY, retry_after=5)
            await self._unload(min(idle, key=lambda managed_model: managed_model.last_used))

    def _available_memory(self) -> int:
        """Bytes for another model: the memory at the start less that of loaded models, or the free memory now.

        The smaller of the two counts, because other programs may have taken memory since the start.
        """
        taken: int = sum(each.definition.memory_bytes for each in (*self, *self._removed) if each.engine)
        return min(self._free(), self._budget - taken)

    async def _unload(self, managed_model: ManagedModel) -> None:
        self._cancel_unload_timer(managed_model)
        if managed_model.engine is not None:
            managed_model.last_model_info = managed_model.model_info
            engine, managed_model.engine = managed_model.engine, None
            await asyncio.shield(self._start_task(engine.close))

    def _start_unload_timer(self, managed_model: ManagedModel) -> None:
        """If the model is unused, schedule its unloading after `keep_alive` seconds; at once if it was removed."""
        self._cancel_unload_timer(managed_model)
        if managed_model.users or self._closed:
            return
        if managed_model.removed:
            self._start_task(partial(self._close_removed, managed_model))
        elif self.keep_alive is not None and managed_model.engine:
            loop = asyncio.get_running_loop()
            managed_model.unload_timer = loop.call_later(self.keep_alive, self._expire, managed_model)

    def _cancel_unload_timer(self, managed_model: ManagedModel) -> None:
        if managed_model.unload_timer is not None:
            managed_model.unload_timer.cancel()
            managed_model.unload_timer = None

    def _expire(self, managed_model: ManagedModel) -> None:
        self._start_task(partial(self._unload_unused, managed_model))

    def _start_task(self, work: TaskFunction) -> asyncio.Task[None]:
        """Start a task that runs to its end even if the caller is cancelled."""
        task = run_logged(work, "model load or unload")
        self._transitions.add(task)
        task.add_done_callback(self._transitions.discard)
        return task

    async def _unload_unused(self, managed_model: ManagedModel) -> None:
        async with self._transition:
            if managed_model.engine and not _busy(managed_model):
                await self._unload(managed_model)
            else:
                self._start_unload_timer(managed_model)


def _busy(managed_model: ManagedModel) -> bool:
    return managed_model.users > 0 or managed_model.load.running > 0 or managed_model.load.waiting > 0
