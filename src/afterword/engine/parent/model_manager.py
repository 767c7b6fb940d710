"""The models of a server, each with an engine in a process of its own: which of them are loaded, and for how long.

Owner of every engine. Whoever uses a model enters it and leaves it, and in between its engine is not ended. Without a
`keep_alive` all are loaded at the start and stay. With one, a model is loaded when somebody enters it, those who come
meanwhile wait for it, and its engine is ended when nobody has been there for so many seconds, or earlier if another
model needs the memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.parent.supervisor import OVERLOADED, EngineState, QueuePolicy, Supervisor
from afterword.engine.protocol import Load, ModelInfo, Promise
from afterword.errors import AfterwordError, LoadFailed, Overloaded, QueueTimeout
from afterword.system.tasks import TaskFunction, run_logged

ModelState = EngineState | Literal["unloaded"]
"""`starting`: its turn to be loaded will come, or it is being loaded."""

DEFAULT_POLICY = QueuePolicy()

_LOADING = "The model is being loaded. Please try again later."
_NO_ROOM = "The memory that this model needs is in use for other models. Please try again later."
_SHUTTING_DOWN = "The server is shutting down."
_log = logging.getLogger("afterword")


@dataclass(frozen=True, slots=True)
class ModelDefinition:
    """A model as far as it is known without loading it.

    `created` is in Unix seconds, `context` in tokens, `memory_bytes` in bytes of memory. `make_engine` makes an engine
    that is not open yet. `advice` is a sentence for whoever runs the server.
    """

    id: str
    created: int
    make_engine: Callable[[], Supervisor]
    context: int = 0
    sequences: int = 0
    promise: Promise = "none"
    memory_bytes: int = 0
    advice: str | None = None


class ManagedModel:
    """A model and the engine that it has at the moment. Its roster changes it, others read."""

    def __init__(self, definition: ModelDefinition, *, kept: bool = True) -> None:
        self.definition = definition
        self.engine: Supervisor | None = None
        self.last_model_info: ModelInfo | None = None  # by the last engine that has ended
        self.engine_metrics = EngineMetrics()  # of one engine after the other
        self.users = 0
        self.waiting = 0
        self.last_used = 0  # of the last who entered or left it
        self.loading: asyncio.Task[AfterwordError | None] | None = None
        self.unload_timer: asyncio.TimerHandle | None = None
        self._kept = kept

    @property
    def id(self) -> str:
        """Its name in requests."""
        return self.definition.id

    @property
    def state(self) -> ModelState:
        """What it is at."""
        if self.engine is not None:
            return self.engine.state
        return "starting" if self._kept or self.loading else "unloaded"

    @property
    def load(self) -> Load:
        """How busy it is; those who wait until it is loaded are waiting too."""
        load = self.engine.load if self.engine else Load()
        return msgspec.structs.replace(load, waiting=load.waiting + self.waiting) if self.waiting else load

    @property
    def restarts(self) -> int:
        """How often the engine that it has now was replaced."""
        return self.engine.restarts if self.engine else 0

    @property
    def model_info(self) -> ModelInfo | None:
        """What its engine says of the model, or the last one said that had loaded it."""
        return self.loaded_engine.model_info if self.loaded_engine else self.last_model_info

    @property
    def promise(self) -> Promise:
        """What an engine that had loaded the model promises of its numbers; until then the most that there can be."""
        return self.model_info.promise if self.model_info else self.definition.promise

    @property
    def loaded_engine(self) -> Supervisor | None:
        """Its engine, if that has loaded the model."""
        return self.engine if self.engine and self.engine.state != "starting" else None


class ModelManager:
    """All models of a server, in the order in which they were named. One event loop calls everything.

    `free` says how many bytes of memory can be taken at the moment.
    """

    def __init__(
        self,
        definitions: Sequence[ModelDefinition],
        *,
        keep_alive: float | None = None,
        policy: QueuePolicy = DEFAULT_POLICY,
        free: Callable[[], int] = lambda: 2**63,
    ) -> None:
        self.keep_alive = keep_alive
        self._models = {definition.id: ManagedModel(definition, kept=keep_alive is None) for definition in definitions}
        self._policy = policy
        self._free = free
        self._budget = free()
        self._turns = itertools.count(1)
        self._transition = asyncio.Lock()  # models come and go one after the other
        self._transitions: set[asyncio.Task[None]] = set()
        self._closed = False

    def __iter__(self) -> Iterator[ManagedModel]:
        return iter(self._models.values())

    def __len__(self) -> int:
        return len(self._models)

    def get(self, name: str) -> ManagedModel | None:
        """The model of that name."""
        return self._models.get(name)

    # ---- life

    async def open(self) -> None:
        """Load what is to be there from the start. Raises `SettingError` if that fails."""
        if self.keep_alive is None:
            for managed_model in self:
                async with self._transition:
                    await self._start(managed_model)

    async def close(self) -> None:
        """End every engine and whatever it is doing."""
        self._closed = True
        for managed_model in self:
            self._cancel_unload_timer(managed_model)
        loading = [managed_model.loading for managed_model in self if managed_model.loading]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        await asyncio.gather(*self._transitions)
        await asyncio.gather(*(managed_model.engine.close() for managed_model in self if managed_model.engine))

    # ---- whoever uses a model

    async def acquire(self, managed_model: ManagedModel) -> Supervisor:
        """Its engine, loaded, which is not ended until `release`.

        Raises `Overloaded`, `QueueTimeout` and `LoadFailed`, and then it was not entered.
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
        """Somebody who has entered it needs it no more."""
        managed_model.users -= 1
        managed_model.last_used = next(self._turns)
        self._start_unload_timer(managed_model)

    def check_started(self) -> None:
        """Nothing is told of models that are still to be loaded. Raises `Overloaded`."""
        for managed_model in self if self.keep_alive is None else ():
            self.check_loaded(managed_model)

    def check_loaded(self, managed_model: ManagedModel, unloaded: str = _LOADING) -> Supervisor:
        """Its engine, loaded. Raises `Overloaded` if it is not, which says `unloaded` if it is not being loaded."""
        if managed_model.loaded_engine is None:
            raise Overloaded(unloaded if managed_model.state == "unloaded" else _LOADING, code="loading", retry_after=5)
        return managed_model.loaded_engine

    def check_capacity(self, managed_model: ManagedModel) -> None:
        """To be asked before any work is done for a request. Raises `Overloaded` if no job would be accepted."""
        if self._closed:
            raise Overloaded(_SHUTTING_DOWN)
        if managed_model.loaded_engine or self.keep_alive is None:
            self.check_loaded(managed_model).check_capacity()
        elif managed_model.waiting >= self._policy.queue:
            raise Overloaded(OVERLOADED)

    async def _loaded(self, managed_model: ManagedModel) -> Supervisor:
        """Wait until it is loaded, as long as anything may wait here."""
        self.check_capacity(managed_model)
        managed_model.loading = managed_model.loading or asyncio.create_task(self._load(managed_model))
        managed_model.waiting += 1
        try:
            done, _ = await asyncio.wait({managed_model.loading}, timeout=self._policy.queue_seconds or None)
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

    # ---- coming and going

    async def _load(self, managed_model: ManagedModel) -> AfterwordError | None:
        """Load it, and end the engines of others if there is no other way. What went wrong, for those who wait."""
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
            self._start_unload_timer(managed_model)  # those who waited may all have left
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
        """End engines that nobody uses, those unused for longest first, until it fits. Raises `Overloaded`."""
        while wanted.definition.memory_bytes > self._available_memory():
            idle = [managed_model for managed_model in self if managed_model.engine and not _busy(managed_model)]
            if not idle:
                raise Overloaded(_NO_ROOM, retry_after=5)
            await self._unload(min(idle, key=lambda managed_model: managed_model.last_used))

    def _available_memory(self) -> int:
        """Bytes for another model: what is left of those at the start, or less where other programs have taken some."""
        return min(
            self._free(),
            self._budget - sum(managed_model.definition.memory_bytes for managed_model in self if managed_model.engine),
        )

    async def _unload(self, managed_model: ManagedModel) -> None:
        self._cancel_unload_timer(managed_model)
        if managed_model.engine is not None:
            managed_model.last_model_info = managed_model.model_info
            engine, managed_model.engine = managed_model.engine, None
            await asyncio.shield(self._begin(engine.close))

    def _start_unload_timer(self, managed_model: ManagedModel) -> None:
        """Look at it again when it has been unused for long enough."""
        self._cancel_unload_timer(managed_model)
        if self.keep_alive is not None and managed_model.engine and not managed_model.users and not self._closed:
            managed_model.unload_timer = asyncio.get_running_loop().call_later(
                self.keep_alive, self._expire, managed_model
            )

    def _cancel_unload_timer(self, managed_model: ManagedModel) -> None:
        if managed_model.unload_timer is not None:
            managed_model.unload_timer.cancel()
            managed_model.unload_timer = None

    def _expire(self, managed_model: ManagedModel) -> None:
        self._begin(partial(self._unload_unused, managed_model))

    def _begin(self, move: TaskFunction) -> asyncio.Task[None]:
        """Something that is carried through, whoever waits for it."""
        task = run_logged(move, "model load or unload")
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
