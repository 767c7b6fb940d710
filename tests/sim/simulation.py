"""The simulation of one seed: a server without HTTP, its clients, and the faults of its worker processes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import msgspec

from afterword.completion import step_queue
from afterword.engine.messages import LoadModel
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.parent.supervisor import Supervisor
from afterword.engine.parent.watchdog import TICK_SECONDS
from afterword.engine.protocol import Load
from afterword.errors import EngineFailure, Overloaded, QueueTimeout, ReaderTooSlow
from afterword.keys.key import Allowance, Key
from afterword.keys.key_registry import KeyRegistry

from .clients import SimulatedRequest, heavy_behavior, key_digest, key_text, random_behavior, send_request
from .invariants import AccountModel, BrokenError, InvariantChecker, ObservedEngine, require
from .process import FakeProcess, Machine
from .virtual import VirtualLoop, run

_MAX_DELAY = 4.0  # seconds after the limit by which a hang must be noticed: a heartbeat, ticks, an earlier stall
_HANG_SECONDS = 600.0 + _MAX_DELAY  # seconds by which an endless pass must be noticed when no pass was measured before
_ALLOWED_OUTCOMES = (
    *("finished", "left", "limited"),
    *(error.__name__ for error in (Overloaded, EngineFailure, QueueTimeout, ReaderTooSlow)),
)
_END_TIMEOUT = 20_000.0  # seconds by which every accepted request must have ended


@dataclass(frozen=True)
class Outcome:
    """The result of a simulation. `broken`: the broken invariant, None if all held; `rule`: its number.

    `accepted`: accepted tokens of drafts.
    """

    seed: int
    trace: str
    broken: str | None
    rule: int | None
    events: int
    deaths: int
    outcomes: dict[str, int]
    accepted: int


def simulate(seed: int, events: int = 200) -> Outcome:
    """Simulate a seed with this many random events."""
    simulation = Simulation(seed)
    broken, rule = None, None
    most_unread, step_queue.MAX_UNREAD_BYTES = step_queue.MAX_UNREAD_BYTES, simulation.unread
    try:
        run(simulation.run(events))
    except BrokenError as error:
        broken, rule = str(error), error.rule
    except Exception as error:
        broken, rule = f"{type(error).__name__}: {error}", 0
    finally:
        step_queue.MAX_UNREAD_BYTES = most_unread
    checker, accepted = simulation.checker, simulation.machine.accepted
    return Outcome(seed, checker.trace, broken, rule, events, checker.deaths, dict(checker.outcomes), accepted)


class Simulation:
    """Owner of the simulated server, clients, workers and checks of one seed.

    The seed also selects the kind of load: in one of 8 seeds many equal requests contend for slots, in another one of 8
    some clients send heavy requests. In one of 4 seeds slots are truncated with snapshots of one byte each, in another
    one of 4 a pass may have several prompts. In one of 3 seeds samples are drafted from their own text too, in another
    one of 3 by a draft model.
    """

    def __init__(self, seed: int) -> None:
        random = self._random = Random(seed)
        self._contended = seed % 8 == 0
        self._heavy = seed % 8 == 6
        self._crash_share = random.choice((0, 0, 0.03, 0.1)) if not self._contended else 0.0
        self._with_faults = random.random() < 0.7 and not self._contended
        self._policy = _policy(random, self._contended)
        settings = LoadModel("sim", 64, random.randint(1, 5), 1, random.choice((4, 8, 32)), "f16", 0, False)
        settings = msgspec.structs.replace(
            settings,
            grid=random.choice((1, 4)),
            promise="exact",
            snapshot_bytes=6 if seed % 4 == 3 else 0,
            speculate="ngram" if seed % 3 == 1 else "off",
            draft=settings if seed % 3 == 2 else None,
        )
        settings = msgspec.structs.replace(settings, joins_prompts=seed % 4 == 1 and settings.grid == 1)
        self.machine = Machine(
            Random(random.getrandbits(32)), settings, token_seconds=random.choice((0.002, 0.02, 1.0))
        )
        if self._heavy:
            settings = self.machine.settings = msgspec.structs.replace(settings, context=256)
        if self._contended or self._heavy:
            self.machine.token_seconds = 0.002
        self.unread = random.choice((1000, 16 * 2**20))  # bytes that are buffered for a slow reader
        self.machine.load_seconds = random.choice((0.1, 1.0, 20.0))
        self.checker = InvariantChecker(self._policy, settings.sequences, fair=self._contended)
        self.machine.record, self.machine.on_pass = self.checker.record, self.checker.add_pass
        self._requests: list[SimulatedRequest] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._allowances = [_allowance(random, self._contended or self._heavy) for _ in range(3)]
        self._failures: list[BaseException] = []
        self._accounts = [AccountModel.of(allowance) for allowance in self._allowances]

    # ---- the course of the simulation

    async def run(self, events: int) -> None:
        """Start the server, make this many random events, then end everything and check the outcomes."""
        loop = asyncio.get_running_loop()
        supervisor = self._supervisor = Supervisor(
            self.machine.settings, self._policy, spawn=self.machine.spawn, clock=loop.time
        )
        keys = [Key(key_text(i), key_digest(i), allowance=each) for i, each in enumerate(self._allowances)]
        self._key_registry = KeyRegistry(keys, clock=lambda: int(loop.time() * 10**9), wall=lambda: 0.0)
        self._engine = ObservedEngine(supervisor, self.checker)
        failures = _Failures()
        logging.getLogger("afterword.system.tasks").addHandler(failures)
        self._failures = failures.seen
        await supervisor.open()
        try:
            if self._contended:
                for index in range(90):
                    self._start_request(index // 30)
            for _ in range(events):
                self._random_event()
                await self._advance(self._pause())
            await self._finish()
        finally:
            await supervisor.close()
            logging.getLogger("afterword.system.tasks").removeHandler(failures)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._check_tasks()
        self._check_ends()

    async def _advance(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._check()
        if seconds:
            self.checker.check_queue()

    def _pause(self) -> float:
        kind = self._random.random()
        if kind < 0.3:
            return 0.0
        return self._random.expovariate(20 if kind < 0.8 else 0.5)

    def _random_event(self) -> None:
        actions: list[tuple[float, Callable[[], None]]] = [
            (10, self._start_request),
            (3, self._cancel_request),
            (1, self._stall),
        ]
        if self._with_faults:
            actions += [(1, self._crash), (0.3, self._stop), (0.3, self._hang), (0.15, self._fail_loading)]
        actions += [(0.2, self._jump_clock)]
        weights = [weight for weight, _ in actions]
        self._random.choices([action for _, action in actions], weights)[0]()

    async def _finish(self) -> None:
        """Wait until all requests end, or shut the server down while requests still run."""
        self.checker.record("drains")
        if self._random.random() < 0.3:
            await self._advance(self._random.uniform(0, 30))
            await self._supervisor.close()
            self._start_request()
            await asyncio.sleep(0.001)
            require(
                8,
                self._requests[-1].outcome in (Overloaded.__name__, "limited"),
                "a request was accepted after the shutdown",
            )
            await asyncio.sleep(200)  # for slow readers
            return
        start = self.checker.now
        while not all(task.done() for task in self._tasks) and self.checker.now < start + _END_TIMEOUT:
            await self._advance(5)
        if all(task.done() for task in self._tasks):
            await self._advance(120)  # long enough for a long pass, or for a hang and a restart
            self._check_idle()

    # ---- events

    def _start_request(self, key: int | None = None) -> None:
        key = self._random.randrange(3) if key is None else key
        if self._heavy:
            behavior = heavy_behavior(self._random)
        else:
            behavior = random_behavior(self._random, self._contended, self._crash_share)
        request = SimulatedRequest(len(self._requests), key_text(key), behavior, self.checker.deaths)
        self._requests.append(request)
        sending = send_request(request, self._engine, self._key_registry, self._accounts[key], self.checker)
        self._tasks.append(asyncio.create_task(sending))

    def _cancel_request(self) -> None:
        """Cancel a random running request."""
        running = [index for index, task in enumerate(self._tasks) if not task.done() and self._requests[index].arrived]
        if running and not self._contended:
            index = self._random.choice(running)
            self.checker.record("cancelled", index)
            self._tasks[index].cancel()

    def _process(self) -> FakeProcess:
        return self.machine.processes[-1]

    def _crash(self) -> None:
        self._process().die("crash")

    def _stop(self) -> None:
        if self._process().alive:
            self.checker.record("stops")
            self._process().stop()

    def _hang(self) -> None:
        self.checker.record("hangs")
        self._process().hang()

    def _stall(self) -> None:
        self.checker.record("stalls")
        self._process().stall(self._random.uniform(0, self._policy.hang_seconds - 3))

    def _fail_loading(self) -> None:
        self.machine.failing = self._random.randint(1, 6)

    def _jump_clock(self) -> None:
        seconds = self._random.choice((5.0, 60.0, 4000.0))
        self.checker.record("clock jumps", seconds)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.jump(seconds)
        self.checker.timers_late_until = loop.time() + 4 * TICK_SECONDS
        for process in self.machine.processes:
            if process.stopped_at is not None:
                process.stopped_at += seconds
            if process.hangs_at is not None:
                process.hangs_at += seconds
            if process.died_at is not None:
                process.died_at += seconds

    # ---- invariants

    def _check(self) -> None:
        """The checks after every event."""
        self._check_tasks()
        self.checker.check_waiting()
        process = self._process()
        if self._supervisor.state == "ready" and process.died_at is not None:
            require(1, self.checker.now <= process.died_at + 0.1, "ready without a worker")
        if process.alive and process.engine_loop is not None:
            try:
                process.engine_loop.check()
            except AssertionError as error:
                raise BrokenError(2, f"slots: {error}") from None
        self._check_hang(process)

    def _check_hang(self, process: FakeProcess) -> None:
        """Check that a stopped worker is replaced in time, and a worker in an endless pass after the longest pass."""
        late = self._policy.hang_seconds + _MAX_DELAY
        if process.alive and process.stopped_at is not None:
            require(6, self.checker.now <= process.stopped_at + late, "a stopped worker was not noticed")
        if process.alive and process.hangs_at is not None:
            if len(self._supervisor._jobs) == len(self._supervisor._waiting):
                process.hangs_at = self.checker.now  # no job waits for it, so the time limit starts later
            require(6, self.checker.now <= process.hangs_at + _HANG_SECONDS, "a hung worker was not noticed")

    def _check_idle(self) -> None:
        process = self._process()
        if process.hangs_at is not None:
            return  # no job waits for it; the supervisor replaces it only when a job does
        idle = Load(self.machine.settings.sequences, 0, 0)
        require(2, self._supervisor.load == idle, f"{self._supervisor.load} when idle")
        if process.alive and process.engine_loop is not None:
            require(2, process.engine_loop.load().running == 0, "slots are in use without requests")

    def _check_tasks(self) -> None:
        """Raise the exception of any failed task. The simulation's own checks fail this way too."""
        processes = [task for process in self.machine.processes for task in process.tasks]
        if self._failures:
            raise self._failures[0]
        for task in (*self._tasks, *processes):
            if task.done() and not task.cancelled() and (problem := task.exception()) is not None:
                raise problem

    def _check_ends(self) -> None:
        """Check that every request ended, and that each error has a cause."""
        for each in self._requests:
            require(1, each.outcome is not None, f"request {each.name} never ended")
            require(1, each.outcome in _ALLOWED_OUTCOMES, f"request {each.name} ended with {each.outcome}")
            if each.outcome == EngineFailure.__name__:
                deaths = self.checker.deaths - each.deaths
                justified = each.behavior.crashes or (self._with_faults and deaths >= 2)
                require(1, justified, f"request {each.name} failed without a cause")
            justified = each.outcome != ReaderTooSlow.__name__ or each.behavior.read_seconds > 0
            require(1, justified, f"request {each.name} was aborted as too slow")


class _Failures(logging.Handler):
    """Collects the exceptions of supervised tasks, which the server logs and does not raise."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.seen.append(record.exc_info[1])


def _policy(random: Random, contended: bool) -> QueuePolicy:
    if contended:
        return QueuePolicy(queue=1000)
    return QueuePolicy(
        queue=random.choice((3, 20, 1000)),
        queue_tokens=random.choice((100, 10**6)),
        queue_seconds=random.choice((3.0, 30.0, 600.0, 0.0)),
        hang_seconds=random.choice((5.0, 15.0)),
    )


def _allowance(random: Random, contended: bool) -> Allowance:
    if contended:
        return Allowance()
    return Allowance(
        requests=random.choice((None, 5, 60)),
        tokens=random.choice((None, 200, 5000)),
        concurrent=random.choice((None, None, 3)),
    )
