"""An engine whose jobs run on engine replicas: finds the replicas, chooses one for each job, and survives their end.

Every job is kept until it ends. If its replica ends, another computes it again, and `PendingJob` removes the tokens
that were delivered before; a job that has brought tokens fails instead if the model's promise is "none". Jobs wait
while there is no replica. The event loop's thread owns all state.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from afterword.engine import messages
from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.parent.job_queue import JobQueue, QueuePolicy
from afterword.engine.parent.managed_engine import EngineState
from afterword.engine.parent.pending_job import PendingJob
from afterword.engine.parent.tokenizer_client import check_text
from afterword.engine.protocol import Job, Load, ModelInfo, PassStats, Step
from afterword.engine.replicas import wire
from afterword.engine.replicas.connection import ReplicaConnection, connect
from afterword.engine.replicas.routed_texts import MAX_LOSSES, RoutedTexts
from afterword.engine.replicas.routing import Rule, block_keys
from afterword.errors import (
    AfterwordError,
    EngineFailure,
    ModelReplaced,
    Overloaded,
    QueueTimeout,
    WorkerDied,
)
from afterword.system.tasks import run_logged, supervised

FIND_SECONDS = 0.5
"""Seconds between two searches for new replicas."""

FindReplicas = Callable[[], Awaitable[Sequence[wire.ReplicaAddress]]]
"""Returns the replicas that run at present. Those that end are noticed by their connections."""

_log = logging.getLogger("afterword")


@dataclass(slots=True, eq=False)
class _RoutedJob:
    """A job, the keys of its prompt, its replica (None while it waits for one), and replicas that did not take it."""

    pending: PendingJob
    keys: Sequence[bytes]
    connection: ReplicaConnection | None = None
    refused: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class RoutedModel:
    """A model on replicas. `settings`: see `ReplicaAddress.settings`; the first replica used has the same."""

    name: str
    rule: Rule[str]
    policy: QueuePolicy
    settings: str = ""


class RoutedEngine:
    """An `Engine` in front of replicas of one model. All methods are called on the event loop's thread."""

    def __init__(self, model: RoutedModel, find: FindReplicas, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._model, self._rule, self._policy, self._find = model, model.rule, model.policy, find
        self._clock = clock
        self.engine_metrics = EngineMetrics()
        self._jobs = JobQueue(self, model.policy, clock)
        self._routed: dict[int, _RoutedJob] = {}  # the jobs of `_jobs`: added by `start`, removed by `_forget`
        self._texts = RoutedTexts(self._usable)
        self._connections: dict[str, ReplicaConnection] = {}
        self._attending: dict[str, asyncio.Task[None]] = {}
        self._unreachable: set[str] = set()  # replicas about which a line was written
        self._different: set[str] = set()  # the same
        self._tasks: list[asyncio.Task[None]] = []
        self._model_info: ModelInfo | None = None
        self._opened = asyncio.Event()
        self._closed = False
        self.restarts = 0
        self.loaded = 0.0
        self.pid: int | None = None

    # ---- the engine protocol

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model. Available only after `open`."""
        assert self._model_info is not None
        return self._model_info

    @property
    def state(self) -> EngineState:
        """`restarting`: there is no replica, and jobs wait for the next."""
        if self._closed:
            return "closed"
        if self._model_info is None:
            return "starting"
        return "ready" if self._usable() else "restarting"

    @property
    def load(self) -> Load:
        """The slots of all replicas, those in use, and the samples that wait here or there."""
        usable = self._usable()
        unplaced = sum(each.pending.job.samples for each in self._routed.values() if each.connection is None)
        return Load(
            sum(each.model_info.sequences for each in usable),
            sum(each.load.running for each in usable),
            sum(each.load.waiting for each in usable) + unplaced,
        )

    @property
    def pass_stats(self) -> PassStats:
        """Nothing: replicas count their own passes."""
        return PassStats()

    def start(self, job: Job) -> PendingJob:
        """Accept a job; see `protocol.Engine`. Raises `Overloaded`."""
        self._check_capacity(len(self._jobs))
        keys = block_keys(job.namespace, job.prompt)  # may raise, so before the job is in either dict
        pending = self._jobs.add(job)
        self._routed[pending.job_id] = routed = _RoutedJob(pending, keys)
        self._place(routed)
        return pending

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        """Tokenize a text; see `protocol.Engine`."""
        check_text(text, self._policy.max_text, self.model_info)
        self._check_capacity(len(self._texts))
        return await self._texts.tokenize(text, special, client, self._clock())

    def check_capacity(self) -> None:
        """Raise `Overloaded` if no job would be accepted now."""
        self._check_capacity(len(self._jobs))

    def _check_capacity(self, waiting: int) -> None:
        if self._closed:
            raise Overloaded("The server is shutting down.")
        self._jobs.check_capacity(waiting, sum(each.model_info.sequences for each in self._usable()))

    # ---- replicas

    async def open(self) -> None:
        """Wait for the first replica."""
        self._tasks.append(supervised(self._search, "search for replicas"))
        await self._opened.wait()

    async def close(self) -> None:
        """End all connections and jobs."""
        self._closed = True
        tasks = [*self._tasks, *self._attending.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._fail_all(Overloaded("The server is shutting down."))

    async def _search(self) -> None:
        while True:
            found = await self._find()
            self._unreachable &= {address.name for address in found}
            self._different &= {address.name for address in found}
            for address in found:
                if address.name not in self._attending:
                    self._attend(address)
            if (accepted := self._jobs.expiry()) is not None:
                self._jobs.expire(accepted)
                self._texts.expire(accepted, QueueTimeout())
            await asyncio.sleep(FIND_SECONDS)

    def _attend(self, address: wire.ReplicaAddress) -> None:
        async def work() -> None:
            await self._listen(address)

        task = self._attending[address.name] = run_logged(work, f"replica {address.name}")
        task.add_done_callback(lambda _: self._attending.pop(address.name, None))

    async def _listen(self, address: wire.ReplicaAddress) -> None:
        """Handle the messages of one replica until it ends."""
        try:
            connection = await connect(address, self._model.name)
        except OSError as problem:
            if address.name not in self._unreachable:
                _log.warning("The replica %s cannot be reached, and is tried again: %s", address.name, problem)
            self._unreachable.add(address.name)
            return
        self._unreachable.discard(address.name)
        self._connections[connection.name] = connection
        try:
            self._choose_model()
            self._report_difference(connection)
            self._place_waiting()
            while (message := await connection.receive()) is not None:
                self._handle(connection, message)
        finally:
            connection.close()
            del self._connections[connection.name]
            if not self._closed:
                self._handle_loss(connection)

    def _usable(self) -> list[ReplicaConnection]:
        """The replicas with the current model: those that stay, or if there are none those that leave."""
        found = [each for each in self._connections.values() if self._has_model(each)]
        return [each for each in found if not each.leaving] or found

    def _has_model(self, connection: ReplicaConnection) -> bool:
        info = self._model_info
        return info is not None and connection.model_info.fingerprint == info.fingerprint

    def _report_difference(self, connection: ReplicaConnection) -> None:
        """Write one line about a replica that gets no jobs because its numbers may differ."""
        if self._model_info is None or self._has_model(connection) or connection.name in self._different:
            return
        self._different.add(connection.name)
        _log.warning(
            "The replica %s gets no jobs while others have the model in use: its fingerprint is %s, and %s is in use. "
            "The model file, the settings or the instructions of the processor differ.",
            *(connection.name, connection.model_info.fingerprint, self._model_info.fingerprint),
        )

    def _choose_model(self) -> None:
        """Keep the model while a replica has it. Then take that of another replica, and fail jobs: tokens differ."""
        if any(self._has_model(each) for each in self._connections.values()):
            return
        opened = self._opened.is_set()
        others = [
            each for each in self._connections.values() if opened or each.address.settings == self._model.settings
        ]
        if not others:
            return
        chosen = min(others, key=lambda each: (each.leaving, each.address.settings != self._model.settings))
        self._model_info, self.loaded = chosen.model_info, 1.0
        if opened:
            _log.warning("The replicas have another model now: %s", chosen.model_info.fingerprint)
            self._fail_all(ModelReplaced())
        self._opened.set()

    def _handle_loss(self, connection: ReplicaConnection) -> None:
        """Give the work of a replica that has ended to others."""
        self._rule.forget(connection.name)
        self.restarts += not connection.leaving
        lost = [each for each in self._routed.values() if each.connection is connection]
        for routed in lost:
            routed.connection = None
            routed.pending.restart(blamed=True)
            if routed.pending.crashes >= MAX_LOSSES:
                self._jobs.fail(routed.pending, EngineFailure())
            elif routed.pending.has_output and self.model_info.promise == "none":
                self._jobs.fail(routed.pending, WorkerDied())
        self._choose_model()
        self._texts.handle_loss(connection)
        self._place_waiting()

    def _handle(self, connection: ReplicaConnection, message: wire.FromReplica) -> None:
        if isinstance(message, messages.PassDone):
            connection.load = message.load
            for job_id, step in message.steps.items():
                if routed := self._at(connection, job_id):
                    self._add_step(routed, step)
        elif isinstance(message, wire.JobFailed):
            if routed := self._at(connection, message.job_id):
                self._handle_failure(routed, connection, wire.error_of(message.failure))
        elif isinstance(message, messages.TextTokens | wire.TextFailed):
            self._texts.handle(connection, message)
        elif isinstance(message, wire.Leaving):
            connection.leaving = True

    def _handle_failure(self, routed: _RoutedJob, connection: ReplicaConnection, error: AfterwordError) -> None:
        """A job has failed. If the replica could not take it, another one may."""
        self._leave_replica(routed)
        routed.refused.add(connection.name)
        others = [each for each in self._usable() if each.name not in routed.refused]
        if isinstance(error, Overloaded) and not routed.pending.has_output and others:
            routed.pending.restart(blamed=False)
            self._place(routed)
        else:
            self._jobs.fail(routed.pending, error)

    def _at(self, connection: ReplicaConnection, job_id: int) -> _RoutedJob | None:
        """The job, if it is open and this replica has it."""
        routed = self._routed.get(job_id)
        return routed if routed and routed.connection is connection else None

    # ---- jobs

    def _place_waiting(self) -> None:
        self._texts.send_waiting()
        for routed in [each for each in self._routed.values() if each.connection is None]:
            self._place(routed)

    def _place(self, routed: _RoutedJob) -> None:
        """Send a job to a replica, one that has not refused it if there is one. It waits if there is none at all."""
        loads = {each.name: each.samples for each in self._usable()}
        left = {name: samples for name, samples in loads.items() if name not in routed.refused}
        if not left:
            routed.refused.clear()  # they may have room by now
            left = loads
        if not left:
            return
        name = self._rule.choose(routed.keys, left)
        connection = routed.connection = self._connections[name]
        connection.samples += routed.pending.job.samples
        connection.send(messages.StartJob(routed.pending.job_id, routed.pending.job))
        if routed.pending.paused:
            connection.send(messages.PauseJob(routed.pending.job_id))

    def _add_step(self, routed: _RoutedJob, step: Step) -> None:
        if self._jobs.add_step(routed.pending, step):
            self._forget(routed)

    def _forget(self, routed: _RoutedJob) -> None:
        del self._routed[routed.pending.job_id]
        self._leave_replica(routed)

    def _leave_replica(self, routed: _RoutedJob) -> None:
        if routed.connection is not None:
            routed.connection.samples -= routed.pending.job.samples
            routed.connection = None

    def _fail_all(self, error: Exception) -> None:
        self._jobs.fail_all(error)
        self._texts.fail(error)

    def drop(self, pending: PendingJob, sample: int) -> None:
        """See `JobOwner.drop`."""
        self._tell(pending, messages.DropSample(pending.job_id, sample))

    def end(self, pending: PendingJob) -> None:
        """See `JobOwner.end`."""
        self._tell(pending, messages.CloseJob(pending.job_id))
        if self._jobs.remove(pending):
            self._forget(self._routed[pending.job_id])

    def pause(self, pending: PendingJob, paused: bool) -> None:
        """See `JobOwner.pause`."""
        kind = messages.PauseJob if paused else messages.ResumeJob
        self._tell(pending, kind(pending.job_id))

    def _tell(self, pending: PendingJob, message: wire.ToReplica) -> None:
        routed = self._routed.get(pending.job_id)
        if routed is not None and routed.connection is not None:
            routed.connection.send(message)
