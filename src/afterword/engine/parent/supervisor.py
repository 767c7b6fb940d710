"""Runs an engine in a process of its own, and is that engine for everyone above.

Every job is kept here until it ends, so a crash of the process loses none: a new one gets them all again, and what a
job had brought already is left out the second time. This file knows neither processes nor which library computes, nor
what a job is for.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import msgspec

from afterword.engine import messages
from afterword.engine.parent.engine_metrics import EngineMetrics, JobTimer
from afterword.engine.parent.pending_job import MAX_CRASHES, PendingJob
from afterword.engine.parent.quarantine import Quarantine
from afterword.engine.parent.tokenizer_client import TokenizerClient, check_text
from afterword.engine.parent.watchdog import TICK_SECONDS, RestartPolicy, Watchdog
from afterword.engine.parent.worker_process import LLAMA_COMMAND, SpawnWorker, WorkerLink, spawn_worker
from afterword.engine.protocol import Job, Load, ModelInfo, PassStats
from afterword.errors import EngineDied, EngineFailure, ModelReplaced, Overloaded, QueueTimeout, SettingError
from afterword.settings.limit_table import limit
from afterword.system.tasks import supervised

EngineState = Literal["starting", "ready", "restarting", "failing", "closed"]
"""`restarting`: jobs wait for the next engine. `failing`: too many have died; nothing is accepted until one lives."""

OVERLOADED = "The server is overloaded: too many requests are waiting. Please try again later."
_FAILING = "The engine cannot be kept running at the moment."

_log = logging.getLogger("afterword")


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """How much may wait and for how long."""

    queue: int = limit(4096, "prompts that wait")
    queue_tokens: int = limit(2**22, "tokens of prompts that wait and of all that they may generate")
    queue_seconds: float = limit(600.0, "seconds that a prompt waits for its turn, 0: for ever")
    max_text: int = limit(2**20, "characters of a text that is tokenized")
    hang_seconds: float = limit(15.0, "seconds without a sign of life after which the engine is replaced, at least 3")

    def __post_init__(self) -> None:
        if self.hang_seconds < 3:
            raise SettingError("The limit hang_seconds must be at least 3: the engine gives a sign of life a second.")


class Supervisor:
    """An `Engine` whose work is done by a child process. One event loop calls everything.

    `settings` may be a function, which is called in a thread before each start and says how the model is to be loaded
    now: its file may be another than at the last start. It may raise `SettingError`.
    """

    def __init__(
        self,
        settings: messages.LoadModel | Callable[[], messages.LoadModel],
        policy: QueuePolicy = QueuePolicy(),
        *,
        command: Sequence[str] = LLAMA_COMMAND,
        spawn: SpawnWorker = spawn_worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._spawn = partial(spawn, command)
        self._clock = clock
        self._names = itertools.count()
        self._runs: dict[int, PendingJob] = {}
        self._waiting: dict[int, PendingJob] = {}  # not yet told to the engine that lives now, in order
        self._trial: PendingJob | None = None  # suspected, and told last
        self._tokenizer_client = TokenizerClient(self._send)
        self._waiting_tokens = 0
        self._quarantine = Quarantine()
        self._watchdog = Watchdog(policy.hang_seconds)
        self._restart_policy = RestartPolicy()
        self._link: WorkerLink | None = None  # from its start, loaded or not
        self._model_info: ModelInfo | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._load = Load()
        self._pass_stats = PassStats()
        self.engine_metrics = EngineMetrics()
        self.state: EngineState = "starting"
        self.restarts = 0
        self.loaded = 0.0  # the share of the model that the last pulse told, while it is being loaded

    # ---- what the rooms above see

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model. Only after `open`."""
        assert self._model_info is not None
        return self._model_info

    @property
    def load(self) -> Load:
        """What is running and waiting."""
        if self.state != "ready":
            return Load(self._load.sequences, 0, sum(run.job.samples for run in self._runs.values()))
        return msgspec.structs.replace(
            self._load, waiting=self._load.waiting + sum(run.job.samples for run in self._waiting.values())
        )

    @property
    def pass_stats(self) -> PassStats:
        """What the slots hold."""
        return self._pass_stats if self.state == "ready" else PassStats()

    @property
    def pid(self) -> int | None:
        """The id of the engine's process, if there is one."""
        return self._link.pid if self._link is not None else None

    def start(self, job: Job) -> PendingJob:
        """Accept a job; see `protocol.Engine`. Raises `EngineFailure` for one that has killed the engine."""
        self._check(job, waiting=len(self._runs), room=self.model_info.sequences)
        now = self._clock()
        run = PendingJob(self, next(self._names), job, now, JobTimer(self.engine_metrics, job, now, self._clock))
        if self._waiting_tokens and self._waiting_tokens + run.size > self._policy.queue_tokens:
            raise Overloaded(OVERLOADED)
        self._waiting_tokens += run.size
        self._runs[run.name] = self._waiting[run.name] = run
        self._send_waiting()
        return run

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        """Tokens of a text; see `protocol.Engine`. While the engine is being replaced, it waits."""
        check_text(text, self._policy.max_text, self.model_info)
        self._check(text, waiting=len(self._tokenizer_client), room=0)
        try:
            return await self._tokenizer_client.tokenize(text, special, self._clock(), client)
        finally:
            self._send_waiting()  # it may have been what jobs were kept back for

    def check_capacity(self) -> None:
        """To be asked before any work is done for a request. Raises `Overloaded` if no job would be accepted."""
        self._check_capacity(len(self._runs), self.model_info.sequences)

    def _check(self, work: Job | str, waiting: int, room: int) -> None:
        self._check_capacity(waiting, room)
        if self._quarantine.contains(work, self._clock()):
            raise EngineFailure()

    def _check_capacity(self, waiting: int, room: int) -> None:
        if self.state == "closed":
            raise Overloaded("The server is shutting down.")
        if self.state == "failing":
            raise Overloaded(_FAILING, retry_after=30)
        if waiting >= self._policy.queue + room:
            raise Overloaded(OVERLOADED)

    # ---- life

    async def open(self) -> None:
        """Start the process and load the model. Raises `SettingError` if that fails."""
        self._tasks.append(supervised(self._check_progress, "engine watch"))
        await self._launch()
        self._tasks.append(supervised(self._serve, "engine life", self._give_up))

    async def close(self) -> None:
        """End the process and every run."""
        self.state = "closed"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._link is not None:
            await self._link.wait_ended()
        self._fail_all(Overloaded("The server is shutting down."))

    async def _launch(self) -> None:
        settings = await asyncio.to_thread(self._settings) if callable(self._settings) else self._settings
        self._watchdog.reset()
        self._link = link = await self._spawn()
        link.send(settings)
        self.loaded = 0.0
        while isinstance(first := await link.receive(), messages.Heartbeat):
            self._watchdog.record_message(first)
            self.loaded = first.loaded
        if not isinstance(first, messages.ModelReady):
            code = await link.wait_ended()
            raise SettingError(
                first.message
                if isinstance(first, messages.LoadFailure)
                else f"The engine's process ended while it was loading {settings.path} (exit status {code})."
            )
        self._watchdog.record_message(first)
        self._set_model_info(first.model_info, settings.path)
        self._load, self._pass_stats = Load(first.model_info.sequences), PassStats()
        self.state = "ready"
        self._tokenizer_client.resend()
        self._send_waiting()

    def _set_model_info(self, model_info: ModelInfo, path: str) -> None:
        """Another model than before cannot go on with what was under way: its tokens and numbers are others."""
        before, self._model_info = self._model_info, model_info
        if before is not None and before.fingerprint != model_info.fingerprint:
            _log.warning("%s holds another model now: %s, before %s.", path, model_info.fingerprint, before.fingerprint)
            self._fail_all(ModelReplaced())
            self._quarantine = Quarantine()  # what killed the other model may be harmless to this one

    async def _serve(self) -> None:
        """Serve with one engine after the other."""
        while True:
            await self._listen()
            self._handle_worker_death()
            while not await self._restart():
                pass

    def _give_up(self) -> None:
        """`_serve` has failed, so what it knows of the jobs may be wrong: end them and the engine, and begin anew."""
        self.state = "restarting"
        if self._link is not None:
            self._link.kill()
        self._fail_all(EngineDied())

    async def _listen(self) -> None:
        assert self._link is not None
        while (message := await self._link.receive()) is not None:
            self._watchdog.record_message(message)
            if isinstance(message, messages.PassDone):
                self._handle_message(message)
            elif isinstance(message, messages.TextTokens):
                self._tokenizer_client.handle_tokens(message)
                self._send_waiting()  # jobs may have been kept back for that text, even if its client has left

    async def _restart(self) -> bool:
        """Start another engine; whether it lives. While too many have died, nobody is kept waiting for the next."""
        assert self._link is not None
        await self._link.wait_ended()
        pause = self._restart_policy.next_delay(self._clock())
        self.state = "failing" if self._restart_policy.is_failing(self._clock()) else "restarting"
        if self.state == "failing":
            self._fail_all(Overloaded(_FAILING, retry_after=30))
        await asyncio.sleep(pause)
        self.restarts += 1
        self.engine_metrics.restarts += 1
        try:
            await self._launch()
        except (SettingError, OSError) as problem:
            _log.warning("The engine could not be started again: %s", problem)
            return False
        return True

    async def _check_progress(self) -> None:
        """Now and then: does the engine hang, and has a job waited for too long?"""
        before = self._clock()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            before, passed = self._clock(), self._clock() - before
            ready = self.state == "ready"
            works = ready and any(not run.paused for run in self._runs.values() if run.name not in self._waiting)
            hangs = self._watchdog.is_hanging(
                passed, works, self._tokenizer_client.sizes_in_progress if ready else (0, 0)
            )
            if hangs and self._link is not None:
                self._watchdog.reset()
                self._link.kill()
            if self._policy.queue_seconds:
                self._expire(before - self._policy.queue_seconds)

    def _expire(self, accepted: float) -> None:
        """Give up what was accepted before that and has not been begun."""
        for run in [run for run in self._runs.values() if run.since < accepted and not run.admitted]:
            self._fail(run, QueueTimeout())
        self._tokenizer_client.expire(accepted, QueueTimeout())

    # ---- death

    def _handle_worker_death(self) -> None:
        """The engine has died. Give up what killed it, and bring the others into the order in which they start again.

        Only what was alone to blame is given up. What was to blame twice is tried first, and nothing beside it until it
        comes further. Then what had brought something goes on, and the others that may be to blame start one after the
        other, each when the one before has brought something. A text that was at work is blamed alone, and comes before
        them: nothing is tried as soon.
        """
        self.state = "restarting"
        running = [run for run in self._runs.values() if run.begun]
        blamed = [
            run for run in self._runs.values() if run.restart(blamed=not any(self._tokenizer_client.sizes_in_progress))
        ]
        if len(blamed) == 1 and blamed[0].crashes >= MAX_CRASHES:
            self._quarantine.add(blamed[0].job, self._clock())
            self._fail(blamed[0], EngineFailure())
        for run in running if self.model_info.promise == "none" else ():
            if run.has_output and run.name in self._runs:
                self._fail(run, EngineDied())
        self._waiting = {run.name: run for run in sorted(self._runs.values(), key=_restart_order)}
        self._trial = None
        if text := self._tokenizer_client.handle_worker_death(MAX_CRASHES, EngineFailure()):
            self._quarantine.add(text, self._clock())

    def _fail_all(self, error: Exception) -> None:
        for run in list(self._runs.values()):
            self._fail(run, error)
        self._tokenizer_client.fail(error)

    def _fail(self, run: PendingJob, error: Exception) -> None:
        self.end(run)
        run.fail(error)

    # ---- runs

    def _send_waiting(self) -> None:
        """Tell the engine of jobs, as far as it may be told."""
        while self.state == "ready" and self._waiting and not self._on_trial():
            run = self._waiting.pop(next(iter(self._waiting)))
            self._send(messages.StartJob(run.name, run.job))
            if run.paused:
                self._send(messages.PauseJob(run.name))
            self._trial = run if run.on_probation else None

    def _on_trial(self) -> bool:
        """Whether something that may have killed an engine is being tried, which is better done alone."""
        run = self._trial
        tried = (
            run is None or run.name not in self._runs or run.paused or (run.has_progress and run.crashes < MAX_CRASHES)
        )
        return self._tokenizer_client.has_suspects or not tried

    def _handle_message(self, message: messages.PassDone) -> None:
        self._load, self._pass_stats = message.load, message.pass_stats
        self.engine_metrics.record_pass(message.pass_stats)
        for name, step in message.steps.items():
            run = self._runs.get(name)
            if run is None:
                continue
            if not run.admitted:
                self._waiting_tokens -= run.size
            run.add_step(step)
            if run.ended:
                del self._runs[name]
                self._restart_policy.record_success()
        self._send_waiting()

    def drop(self, pending: PendingJob, sample: int) -> None:
        """End one sample of a run."""
        if pending.name in self._runs:
            self._send(messages.DropSample(pending.name, sample))

    def end(self, pending: PendingJob) -> None:
        """Forget a run."""
        if self._runs.pop(pending.name, None) is None:
            return
        self._waiting.pop(pending.name, None)
        if not pending.admitted:
            self._waiting_tokens -= pending.size
        self._send(messages.CloseJob(pending.name))
        self._send_waiting()

    def pause(self, pending: PendingJob, paused: bool) -> None:
        """Have the engine hold a run, or go on with it."""
        if pending.name in self._runs and pending.name not in self._waiting:
            self._send(messages.PauseJob(pending.name) if paused else messages.ResumeJob(pending.name))
            self._send_waiting()  # a run that is paused is not on trial

    def _send(self, message: messages.WorkerMessage) -> None:
        if self._link is not None and self.state == "ready":
            self._link.send(message)


def _restart_order(run: PendingJob) -> int:
    """When a job is begun again after a death: the suspects of two first, alone."""
    if run.crashes >= MAX_CRASHES:
        return 0
    if run.has_output:
        return 1
    return 2 if run.on_probation else 3
