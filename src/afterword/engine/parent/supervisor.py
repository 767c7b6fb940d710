"""Implements the `Engine` protocol with a worker process: starts the worker, sends it jobs, replaces it.

The supervisor keeps every job until it ends, so a worker crash loses none. A new worker receives all open jobs again,
and `PendingJob` removes the tokens that were delivered before. The event loop's thread owns all state here.

This module must not depend on how processes are made (`worker_process`), on the library that computes, or on
`completion/`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from afterword.engine import messages
from afterword.engine.parent.engine_metrics import EngineMetrics
from afterword.engine.parent.job_queue import DEFAULT_POLICY, JobQueue, QueuePolicy
from afterword.engine.parent.managed_engine import EngineState
from afterword.engine.parent.pending_job import MAX_CRASHES, PendingJob
from afterword.engine.parent.quarantine import Quarantine
from afterword.engine.parent.restart_policy import RestartPolicy
from afterword.engine.parent.tokenizer_client import TokenizerClient, check_text
from afterword.engine.parent.watchdog import TICK_SECONDS, Watchdog
from afterword.engine.parent.worker_process import LLAMA, SpawnWorker, WorkerLink, WorkerProgram, spawn_worker
from afterword.engine.protocol import Job, Load, ModelInfo, PassStats
from afterword.errors import EngineFailure, ModelReplaced, Overloaded, QueueTimeout, SettingError, WorkerDied
from afterword.system.tasks import supervised

_FAILING = "The worker process cannot be kept running at the moment."

_log = logging.getLogger("afterword")


class Supervisor:
    """An `Engine` that runs in a child process. All methods are called on the event loop's thread.

    `settings` may be a function that returns them. It is called in a thread before each start of a worker, because the
    model's file may have changed since the last start. It may raise `SettingError`.
    """

    def __init__(
        self,
        settings: messages.LoadMessage | Callable[[], messages.LoadMessage],
        policy: QueuePolicy = DEFAULT_POLICY,
        *,
        program: WorkerProgram = LLAMA,
        spawn: SpawnWorker = spawn_worker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._policy = policy
        self._spawn = partial(spawn, program)
        self._clock = clock
        self.engine_metrics = EngineMetrics()
        self._jobs = JobQueue(self, policy, clock)
        self._waiting: dict[int, PendingJob] = {}  # jobs not yet sent to the current worker, in order
        self._trial: PendingJob | None = None  # the job on probation that was sent last
        self._tokenizer_client = TokenizerClient(self._send)
        self._quarantine = Quarantine()
        self._watchdog = Watchdog(policy.hang_seconds)
        self._restart_policy = RestartPolicy()
        self._link: WorkerLink | None = None  # set as soon as the process is started, before the model is loaded
        self._model_info: ModelInfo | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._load = Load()
        self._pass_stats = PassStats()
        self.state: EngineState = "starting"
        self.restarts = 0
        self.loaded = 0.0  # the loaded share of the model, from 0 to 1, by the last heartbeat while it is loading

    # ---- the engine protocol

    @property
    def model_info(self) -> ModelInfo:
        """Facts about the model. Available only after `open`."""
        assert self._model_info is not None
        return self._model_info

    @property
    def load(self) -> Load:
        """The numbers of running and of waiting samples."""
        if self.state != "ready":
            return Load(self._load.sequences, 0, sum(pending.job.samples for pending in self._jobs))
        unsent = sum(pending.job.samples for pending in self._waiting.values())
        return msgspec.structs.replace(self._load, waiting=self._load.waiting + unsent)

    @property
    def pass_stats(self) -> PassStats:
        """The statistics of the last forward pass and of the slots."""
        return self._pass_stats if self.state == "ready" else PassStats()

    @property
    def pid(self) -> int | None:
        """The worker's process id, None if there is no worker."""
        return self._link.pid if self._link is not None else None

    def start(self, job: Job) -> PendingJob:
        """Accept a job; see `protocol.Engine`. Raises `Overloaded`, and `EngineFailure` for a job in quarantine."""
        self._check(job, len(self._jobs), self.model_info.sequences)
        pending = self._jobs.add(job)
        self._waiting[pending.job_id] = pending
        self._send_waiting()
        return pending

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        """Tokenize a text; see `protocol.Engine`. While the worker is being replaced, the text waits."""
        check_text(text, self._policy.max_text, self.model_info)
        self._check(text, len(self._tokenizer_client), 0)
        try:
            return await self._tokenizer_client.tokenize(text, special, self._clock(), client)
        finally:
            self._send_waiting()  # jobs may have been held back because of this text

    def check_capacity(self) -> None:
        """Raise `Overloaded` if no job would be accepted now. Call it before any work is done for a request."""
        self._check_capacity(len(self._jobs), self.model_info.sequences)

    def _check(self, work: Job | str, waiting: int, running: int) -> None:
        self._check_capacity(waiting, running)
        if self._quarantine.contains(work, self._clock()):
            raise EngineFailure()

    def _check_capacity(self, waiting: int, running: int) -> None:
        """`waiting`: jobs or texts that were accepted. `running`: how many of them may run besides the queue."""
        if self.state == "closed":
            raise Overloaded("The server is shutting down.")
        if self.state == "failing":
            raise Overloaded(_FAILING, retry_after=30)
        self._jobs.check_capacity(waiting, running)

    # ---- start and end of the worker

    async def open(self) -> None:
        """Start the worker and load the model. Raises `SettingError` if that fails."""
        self._tasks.append(supervised(self._check_progress, "worker watchdog"))
        await self._launch()
        self._tasks.append(supervised(self._serve, "worker supervision", self._reset_after_failure))

    async def close(self) -> None:
        """End the worker and all jobs."""
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
        self.engine_metrics.record_worker_start()
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
                else f"The worker process ended while it was loading {settings.path} (exit status {code})."
            )
        self._watchdog.record_message(first)
        self._set_model_info(first.model_info, settings.path)
        self._load, self._pass_stats = Load(first.model_info.sequences), PassStats()
        self.state = "ready"
        self._tokenizer_client.resend()
        self._send_waiting()

    def _set_model_info(self, model_info: ModelInfo, path: str) -> None:
        """Fail all jobs if the new worker has loaded another model, because its tokens and numbers are different."""
        before, self._model_info = self._model_info, model_info
        if before is not None and before.fingerprint != model_info.fingerprint:
            _log.warning(
                "The model in %s has changed: %s, before %s.", path, model_info.fingerprint, before.fingerprint
            )
            self._fail_all(ModelReplaced())
            self._quarantine = Quarantine()  # a job that crashed the other model may be harmless to this one

    async def _serve(self) -> None:
        """Handle the messages of one worker after the other."""
        while True:
            await self._listen()
            self._handle_worker_death()
            while not await self._restart():
                pass

    def _reset_after_failure(self) -> None:
        """Handle an exception in `_serve`: the state of the jobs may be wrong, so fail them all and kill the worker."""
        self.state = "restarting"
        if self._link is not None:
            self._link.kill()
        self._fail_all(WorkerDied())

    async def _listen(self) -> None:
        assert self._link is not None
        while (message := await self._link.receive()) is not None:
            self._watchdog.record_message(message)
            if isinstance(message, messages.PassDone):
                self._handle_message(message)
            elif isinstance(message, messages.Heartbeat):
                self.engine_metrics.record_store(message.store)
            elif isinstance(message, messages.TextTokens):
                self._tokenizer_client.handle_tokens(message)
                self._send_waiting()  # jobs may have been held back because of this text, even if its client has left

    async def _restart(self) -> bool:
        """Start another worker and return whether it loaded the model. In the state `failing`, fail all jobs first."""
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
            _log.warning("The worker could not be started again: %s", problem)
            return False
        return True

    async def _check_progress(self) -> None:
        """Every `TICK_SECONDS`: kill the worker if it hangs, and fail jobs and texts that have waited too long."""
        before = self._clock()
        while True:
            await asyncio.sleep(TICK_SECONDS)
            before, passed = self._clock(), self._clock() - before
            ready = self.state == "ready"
            works = ready and any(not each.paused for each in self._jobs if each.job_id not in self._waiting)
            hangs = self._watchdog.is_hanging(
                passed, works, self._tokenizer_client.sizes_in_progress if ready else (0, 0)
            )
            if hangs and self._link is not None:
                self._watchdog.reset()
                self._link.kill()
            if (accepted := self._jobs.expiry()) is not None:
                self._jobs.expire(accepted)
                self._tokenizer_client.expire(accepted, QueueTimeout())

    # ---- worker crashes

    def _handle_worker_death(self) -> None:
        """Quarantine the job or text that crashed the worker, and order the other jobs for the restart.

        A job is quarantined only if it is the sole suspect of its last crash and was a suspect of `MAX_CRASHES`. The
        restart order is:

        1. Texts that were being tokenized in a crash, one at a time. If there is such a text, no job is blamed.
        2. Jobs that were suspects `MAX_CRASHES` times, one at a time: no other job starts until they make progress.
        3. Jobs that have delivered tokens.
        4. The other suspects: each starts when the one before has made progress.
        5. All other jobs.
        """
        self.state = "restarting"
        running = [pending for pending in self._jobs if pending.begun]
        blamed = [
            pending
            for pending in self._jobs
            if pending.restart(blamed=not any(self._tokenizer_client.sizes_in_progress))
        ]
        if len(blamed) == 1 and blamed[0].crashes >= MAX_CRASHES:
            self._quarantine.add(blamed[0].job, self._clock())
            self._jobs.fail(blamed[0], EngineFailure())
        for pending in running if self.model_info.promise == "none" else ():
            if pending.has_output and pending in self._jobs:
                self._jobs.fail(pending, WorkerDied())
        self._waiting = {pending.job_id: pending for pending in sorted(self._jobs, key=_restart_order)}
        self._trial = None
        if text := self._tokenizer_client.handle_worker_death(MAX_CRASHES, EngineFailure()):
            self._quarantine.add(text, self._clock())

    def _fail_all(self, error: Exception) -> None:
        self._jobs.fail_all(error)
        self._tokenizer_client.fail(error)

    # ---- jobs

    def _send_waiting(self) -> None:
        """Send waiting jobs to the worker until one of them is on trial."""
        while self.state == "ready" and self._waiting and not self._on_trial():
            pending = self._waiting.pop(next(iter(self._waiting)))
            self._send(messages.StartJob(pending.job_id, pending.job))
            if pending.paused:
                self._send(messages.PauseJob(pending.job_id))
            self._trial = pending if pending.on_probation else None

    def _on_trial(self) -> bool:
        """Whether the worker computes a suspect of an earlier crash, beside which no other job should start."""
        pending = self._trial
        over = (
            pending is None
            or pending not in self._jobs
            or pending.paused
            or (pending.has_progress and pending.crashes < MAX_CRASHES)
        )
        return self._tokenizer_client.has_suspects or not over

    def _handle_message(self, message: messages.PassDone) -> None:
        self._load, self._pass_stats = message.load, message.pass_stats
        self.engine_metrics.record_pass(message.pass_stats)
        for job_id, step in message.steps.items():
            pending = self._jobs.get(job_id)
            if pending is not None and self._jobs.add_step(pending, step):
                self._restart_policy.record_success()
        self._send_waiting()

    def drop(self, pending: PendingJob, sample: int) -> None:
        """See `JobOwner.drop`."""
        if pending in self._jobs:
            self._send(messages.DropSample(pending.job_id, sample))
            if pending.ended:  # by stop strings: the worker has done what was asked
                self._restart_policy.record_success()

    def end(self, pending: PendingJob) -> None:
        """See `JobOwner.end`."""
        if not self._jobs.remove(pending):
            return
        self._waiting.pop(pending.job_id, None)
        self._send(messages.CloseJob(pending.job_id))
        self._send_waiting()

    def pause(self, pending: PendingJob, paused: bool) -> None:
        """See `JobOwner.pause`."""
        if pending in self._jobs and pending.job_id not in self._waiting:
            self._send(messages.PauseJob(pending.job_id) if paused else messages.ResumeJob(pending.job_id))
            self._send_waiting()  # a paused job is not on trial

    def _send(self, message: messages.WorkerMessage) -> None:
        if self._link is not None and self.state == "ready":
            self._link.send(message)


def _restart_order(pending: PendingJob) -> int:
    """The sort key of a job after a worker crash; see `_handle_worker_death`."""
    if pending.crashes >= MAX_CRASHES:
        return 0
    if pending.has_output:
        return 1
    return 2 if pending.on_probation else 3
