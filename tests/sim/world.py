"""One seed, one world: a server without its HTTP, its visitors, and what befalls its engines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import msgspec

from afterword.completion import run as completion_run
from afterword.engine.messages import LoadModel
from afterword.engine.parent.supervisor import QueuePolicy, Supervisor
from afterword.engine.parent.watchdog import TICK_SECONDS
from afterword.engine.protocol import Load
from afterword.keys.key import Allowance, Key
from afterword.keys.key_registry import KeyRegistry

from .clients import Visit, greedy_wish, key_digest, key_text, visit, wish
from .invariants import Account, BrokenError, Ledger, ObservedEngine, require
from .process import FakeProcess, Machine
from .virtual import VirtualLoop, run

_LATE = 4.0  # seconds that a hang may take to be noticed beyond its limit: a pulse, ticks, a stall before it
_SPINS = 600.0 + _LATE  # seconds, where no pass has been measured before
_ENDS = ("finished", "left", "limited", "Overloaded", "EngineFailure", "QueueTimeout", "ReaderTooSlow")
_HEALED = 20_000.0  # seconds after which everything that was accepted has ended, or never will


@dataclass(frozen=True)
class Outcome:
    """How a seed went. `broken` is None if every invariant held."""

    seed: int
    trace: str
    broken: str | None
    rule: int | None
    events: int
    deaths: int
    outcomes: dict[str, int]


def simulate(seed: int, events: int = 200) -> Outcome:
    """Run a seed."""
    world = World(seed)
    broken, rule = None, None
    most_unread, completion_run.MAX_UNREAD_BYTES = completion_run.MAX_UNREAD_BYTES, world.unread
    try:
        run(world.live(events))
    except BrokenError as error:
        broken, rule = str(error), error.rule
    except Exception as error:
        broken, rule = f"{type(error).__name__}: {error}", 0
    finally:
        completion_run.MAX_UNREAD_BYTES = most_unread
    ledger = world.ledger
    return Outcome(seed, ledger.trace, broken, rule, events, ledger.deaths, dict(ledger.outcomes))


class World:
    """Owner of everything in it."""

    def __init__(self, seed: int) -> None:
        random = self._random = Random(seed)
        self._crowd = seed % 8 == 0
        self._greedy = seed % 8 == 6
        self._poison = random.choice((0, 0, 0.03, 0.1)) if not self._crowd else 0.0
        self._violent = random.random() < 0.7 and not self._crowd
        self._policy = _policy(random, self._crowd)
        shape = LoadModel("sim", 64, random.randint(1, 5), 1, random.choice((4, 8, 32)), "f16", 0, False)
        shape = msgspec.structs.replace(shape, grid=random.choice((1, 4)), promise="exact")
        self._machine = Machine(Random(random.getrandbits(32)), shape, token_seconds=random.choice((0.002, 0.02, 1.0)))
        if self._greedy:
            shape = self._machine.shape = msgspec.structs.replace(shape, context=256)
        if self._crowd or self._greedy:
            self._machine.token_seconds = 0.002
        self.unread = random.choice((1000, 16 * 2**20))  # bytes that may wait for a slow reader
        self._machine.load_seconds = random.choice((0.1, 1.0, 20.0))
        self.ledger = Ledger(self._policy, shape.sequences, fair=self._crowd)
        self._machine.told, self._machine.passed = self.ledger.note, self.ledger.passed
        self._visits: list[Visit] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._allowances = [_allowance(random, self._crowd or self._greedy) for _ in range(3)]
        self._failures: list[BaseException] = []
        self._accounts = [Account.of(allowance) for allowance in self._allowances]

    # ---- the course of things

    async def live(self, events: int) -> None:
        """Let so many things happen, then let everything end."""
        loop = asyncio.get_running_loop()
        supervisor = self._supervisor = Supervisor(
            self._machine.shape, self._policy, spawn=self._machine.spawn, clock=loop.time
        )
        keys = [Key(key_text(i), key_digest(i), allowance=each) for i, each in enumerate(self._allowances)]
        self._key_registry = KeyRegistry(keys, clock=lambda: int(loop.time() * 10**9), wall=lambda: 0.0)
        self._engine = ObservedEngine(supervisor, self.ledger)
        failures = _Failures()
        logging.getLogger("afterword.system.tasks").addHandler(failures)
        self._failures = failures.seen
        await supervisor.open()
        try:
            if self._crowd:
                for index in range(90):
                    self._arrive(index // 30)
            for _ in range(events):
                self._happen()
                await self._pass(self._pause())
            await self._end()
        finally:
            await supervisor.close()
            logging.getLogger("afterword.system.tasks").removeHandler(failures)
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._check_tasks()
        self._check_ends()

    async def _pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self._check()
        if seconds:
            self.ledger.check_queue()

    def _pause(self) -> float:
        kind = self._random.random()
        if kind < 0.3:
            return 0.0
        return self._random.expovariate(20 if kind < 0.8 else 0.5)

    def _happen(self) -> None:
        """One event."""
        acts: list[tuple[float, Callable[[], None]]] = [(10, self._arrive), (3, self._leave), (1, self._stall)]
        if self._violent:
            acts += [(1, self._crash), (0.3, self._stop), (0.3, self._spin), (0.15, self._fail_loading)]
        acts += [(0.2, self._leap)]
        weights = [weight for weight, _ in acts]
        self._random.choices([act for _, act in acts], weights)[0]()

    async def _end(self) -> None:
        """Either everything ends by itself, or the server is told to end: what runs may go on for a while."""
        self.ledger.note("drains")
        if self._random.random() < 0.3:
            await self._pass(self._random.uniform(0, 30))
            await self._supervisor.close()
            self._arrive()
            await asyncio.sleep(0.001)
            require(8, self._visits[-1].outcome in ("Overloaded", "limited"), "something was begun after the end")
            await asyncio.sleep(200)  # for slow readers
            return
        start = self.ledger.now
        while not all(task.done() for task in self._tasks) and self.ledger.now < start + _HEALED:
            await self._pass(5)
        if all(task.done() for task in self._tasks):
            await self._pass(120)  # a long pass, or a hang and another start
            self._check_idle()

    # ---- events

    def _arrive(self, key: int | None = None) -> None:
        key = self._random.randrange(3) if key is None else key
        wanted = greedy_wish(self._random) if self._greedy else wish(self._random, self._crowd, self._poison)
        one = Visit(len(self._visits), key_text(key), wanted, self.ledger.deaths)
        self._visits.append(one)
        self._tasks.append(
            asyncio.create_task(visit(one, self._engine, self._key_registry, self._accounts[key], self.ledger))
        )

    def _leave(self) -> None:
        """Somebody leaves."""
        there = [index for index, task in enumerate(self._tasks) if not task.done() and self._visits[index].arrived]
        if there and not self._crowd:
            index = self._random.choice(there)
            self.ledger.note("leaves", index)
            self._tasks[index].cancel()

    def _process(self) -> FakeProcess:
        return self._machine.processes[-1]

    def _crash(self) -> None:
        self._process().die("crash")

    def _stop(self) -> None:
        if self._process().alive:
            self.ledger.note("stops")
            self._process().stop()

    def _spin(self) -> None:
        self.ledger.note("spins")
        self._process().spin()

    def _stall(self) -> None:
        self.ledger.note("stalls")
        self._process().stall(self._random.uniform(0, self._policy.hang_seconds - 3))

    def _fail_loading(self) -> None:
        self._machine.failing = self._random.randint(1, 6)

    def _leap(self) -> None:
        seconds = self._random.choice((5.0, 60.0, 4000.0))
        self.ledger.note("leaps", seconds)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        loop.leap(seconds)
        self.ledger.overslept = loop.time() + 4 * TICK_SECONDS
        for process in self._machine.processes:
            if process.stopped_at is not None:
                process.stopped_at += seconds
            if process.spins_at is not None:
                process.spins_at += seconds
            if process.died_at is not None:
                process.died_at += seconds

    # ---- what must hold

    def _check(self) -> None:
        """After every event."""
        self._check_tasks()
        self.ledger.check_waiting()
        process = self._process()
        if self._supervisor.state == "ready" and process.died_at is not None:
            require(1, self.ledger.now <= process.died_at + 0.1, "ready without an engine")
        if process.alive and process.core is not None:
            try:
                process.core.check()
            except AssertionError as error:
                raise BrokenError(2, f"slots: {error}") from None
        self._check_hang(process)

    def _check_hang(self, process: FakeProcess) -> None:
        """A stopped process is noticed by its silence; one that spins, once that is longer than a pass."""
        late = self._policy.hang_seconds + _LATE
        if process.alive and process.stopped_at is not None:
            require(6, self.ledger.now <= process.stopped_at + late, "a stopped engine was not noticed")
        if process.alive and process.spins_at is not None:
            if len(self._supervisor._runs) == len(self._supervisor._waiting):
                process.spins_at = self.ledger.now  # nobody waits for it
            require(6, self.ledger.now <= process.spins_at + _SPINS, "a spinning engine was not noticed")

    def _check_idle(self) -> None:
        process = self._process()
        if process.spins_at is not None:
            return  # and nobody waits for it: it is replaced when somebody does
        require(
            2, self._supervisor.load == Load(self._machine.shape.sequences, 0, 0), f"{self._supervisor.load} when idle"
        )
        if process.alive and process.core is not None:
            require(2, process.core.load().running == 0, "slots are in use when nobody is there")

    def _check_tasks(self) -> None:
        """Has anything raised what it should not? A world's own checks do so too."""
        processes = [task for process in self._machine.processes for task in process.tasks]
        if self._failures:
            raise self._failures[0]
        for task in (*self._tasks, *processes):
            if task.done() and not task.cancelled() and (problem := task.exception()) is not None:
                raise problem

    def _check_ends(self) -> None:
        """Each ended once, and none with an error that it has not deserved."""
        for each in self._visits:
            require(1, each.outcome is not None, f"request {each.name} never ended")
            require(1, each.outcome in _ENDS, f"request {each.name} ended with {each.outcome}")
            if each.outcome == "EngineFailure":
                deaths = self.ledger.deaths - each.deaths
                deserved = each.wish.deadly or (self._violent and deaths >= 2)
                require(1, deserved, f"request {each.name} was given up")
            require(1, each.outcome != "ReaderTooSlow" or each.wish.slow > 0, f"request {each.name} was cut")


class _Failures(logging.Handler):
    """Collects the exceptions of supervised tasks, which are logged and not raised."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[BaseException] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1]:
            self.seen.append(record.exc_info[1])


def _policy(random: Random, crowd: bool) -> QueuePolicy:
    if crowd:
        return QueuePolicy(queue=1000)
    return QueuePolicy(
        queue=random.choice((3, 20, 1000)),
        queue_tokens=random.choice((100, 10**6)),
        queue_seconds=random.choice((3.0, 30.0, 600.0, 0.0)),
        hang_seconds=random.choice((5.0, 15.0)),
    )


def _allowance(random: Random, crowd: bool) -> Allowance:
    if crowd:
        return Allowance()
    return Allowance(
        requests=random.choice((None, 5, 60)),
        tokens=random.choice((None, 200, 5000)),
        concurrent=random.choice((None, None, 3)),
    )
