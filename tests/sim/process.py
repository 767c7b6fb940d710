"""An engine's process that is none: the real loop, scheduler and slots, in the same event loop as the server.

It stands in where `afterword.engine.parent.worker_process.WorkerLink` is, and can die, stop, spin and stall as it is
told.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from history_runner import VOCABULARY, HistoryRunner

from afterword.engine import messages
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.protocol import ModelInfo
from afterword.engine.worker.worker_main import PassMonitor, apply_message

DEADLY, BOMB, CURSED = "!", "#", "?"
"""A prompt with the first kills as it is read, with the second after some tokens; the last kills the tokenizer."""
LETTERS = "".join(chr(65 + token) for token in range(VOCABULARY)) + DEADLY + BOMB + CURSED
_FUSE = 6  # tokens
_WAY = 0.001  # seconds from one process to the other


class DeadError(Exception):
    """Something computed has killed the process."""


@dataclass
class Machine:
    """What processes run on. `failing`: so many of the next cannot load the model."""

    random: Random
    shape: messages.LoadModel
    promise: str = "exact"
    load_seconds: float = 1.0
    pass_seconds: float = 0.01
    token_seconds: float = 0.002
    failing: int = 0
    processes: list[FakeProcess] = field(default_factory=list)
    passed: Callable[[FakeProcess, ForwardBatch], None] = lambda *_: None
    told: Callable[..., None] = lambda *_: None

    async def spawn(self, _: object) -> FakeProcess:
        """A new process; see `afterword.engine.parent.worker_process.SpawnWorker`."""
        self.processes.append(FakeProcess(self, self.failing > 0))
        self.failing = max(0, self.failing - 1)
        return self.processes[-1]

    def card(self) -> ModelInfo:
        """The model's."""
        pieces = tuple(letter.encode() for letter in LETTERS)
        shape = self.shape
        return ModelInfo(
            *(0, shape.context, shape.sequences, pieces, (0,), None, 0, False, False, 1, None, "fp_sim"),
            promise=self.promise,  # type: ignore[arg-type]
        )


class TimedRunner(HistoryRunner):
    """A pass takes time, which is slept when it is over; and some tokens are deadly."""

    def __init__(self, machine: Machine, process: FakeProcess) -> None:
        shape = machine.shape
        super().__init__(shape.sequences, shape.chunk, grid=shape.grid)
        self.ahead = 0.0  # seconds by which this process's clock is before the loop's
        self.monitor: PassMonitor | None = None
        self.pulse = messages.Heartbeat(0, 0, 0, 0.0)
        self._machine = machine
        self._process = process

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.ahead

    def run(self, batch: ForwardBatch) -> Logits:
        assert self.monitor is not None
        self.pulse = self.monitor.heartbeat()
        tokens = sum(len(row.tokens) for row in batch.entries)
        machine = self._machine
        self.ahead = (machine.pass_seconds + tokens * machine.token_seconds) * machine.random.uniform(0.7, 1.3)
        machine.passed(self._process, batch)
        logits = super().run(batch)
        if any(self._deadly(slot) for slot in {row.slot for row in batch.entries}):
            raise DeadError
        return logits

    def _deadly(self, slot: int) -> bool:
        state = self.state[slot]
        if LETTERS.index(DEADLY) in state:
            return True
        bomb = LETTERS.index(BOMB)
        return bomb in state and len(state) - state.index(bomb) > _FUSE


class FakeProcess:
    """See `afterword.engine.parent.worker_process.WorkerLink`. `stopped_at` and `spins_at`: since when it hangs."""

    pid = None

    def __init__(self, machine: Machine, fails: bool) -> None:
        self.alive = True
        self.core: EngineLoop | None = None
        self.stopped_at: float | None = None
        self.spins_at: float | None = None
        self.died_at: float | None = None
        self._machine = machine
        self._fails = fails
        self._spins = False
        self._runner = TimedRunner(machine, self)
        self._inbox: deque[tuple[float, messages.WorkerMessage]] = deque()
        self._outbox: asyncio.Queue[tuple[float, messages.ServerMessage | None]] = asyncio.Queue()
        self._lanes: tuple[asyncio.Queue[messages.TokenizeText], ...] = (asyncio.Queue(), asyncio.Queue())
        self._news = asyncio.Event()
        self._going = asyncio.Event()
        self._going.set()
        works = (self._compute(), self._pulse(), *(self._tokenize(texts) for texts in self._lanes))
        self.tasks = [asyncio.create_task(work) for work in works]

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- what the server sees

    def send(self, message: messages.WorkerMessage) -> None:
        if isinstance(message, messages.TokenizeText):
            self._lanes[message.long].put_nowait(message)  # they have threads of their own, and wait for no pass
            return
        if isinstance(message, messages.CancelTokenize):
            return  # the text is short, and answered soon
        self._inbox.append((self.now + _WAY, message))
        self._news.set()

    async def receive(self) -> messages.ServerMessage | None:
        ready, message = await self._outbox.get()
        await asyncio.sleep(max(0.0, ready - self.now))
        return message

    def kill(self) -> None:
        if self.alive and self.stopped_at is None and self.spins_at is None:
            raise AssertionError("a healthy engine was killed")
        self.die("killed")

    async def wait_ended(self) -> int | None:
        self.die("ended")
        await asyncio.sleep(0.01)
        return -9

    # ---- what happens to it

    def die(self, why: str) -> None:
        """It is gone, and what it was computing with it; what it had sent still arrives."""
        if self.alive:
            self.alive, self.died_at = False, self.now
            self._machine.told("died", self._machine.processes.index(self), why)
            for task in self.tasks:
                task.cancel()
            self._outbox.put_nowait((self.now + _WAY, None))

    def stop(self) -> None:
        """It does nothing any more."""
        self.stopped_at = self.now
        self._going.clear()

    def stall(self, seconds: float) -> None:
        """It does nothing for a while."""
        if self._going.is_set():
            self._going.clear()
            asyncio.get_running_loop().call_later(seconds, self._go)

    def _go(self) -> None:
        if self.stopped_at is None:
            self._going.set()

    def spin(self) -> None:
        """The pass after this one never ends."""
        self._spins = True

    # ---- what it does

    async def _compute(self) -> None:
        await self._rest(self._machine.load_seconds)
        if self._fails:
            self._emit(messages.LoadFailure("The model is gone."))
            return
        self._emit(messages.ModelReady(self._machine.card()))
        monitor = self._runner.monitor = PassMonitor(self._runner, self._runner.clock)
        self.core = EngineLoop(monitor, self._runner.clock)
        try:
            while True:
                await self._beat(self.core)
        except DeadError:
            self.die("deadly")

    async def _beat(self, core: EngineLoop) -> None:
        changed = self._take(core)
        self._runner.ahead = 0.0
        computed = len(self._runner.batches)
        steps = core.step()
        if len(self._runner.batches) > computed:
            await self._rest(self._runner.ahead, spins=self._spins)
        self._runner.ahead = 0.0
        if self._runner.monitor:
            self._runner.pulse = self._runner.monitor.heartbeat()
        if steps or changed:
            self._emit(messages.PassDone(steps or {}, core.load()))
        if steps is None and not changed:
            await self._wait()

    async def _wait(self) -> None:
        while not self._inbox:
            self._news.clear()
            await self._news.wait()
        await self._rest(max(0.0, self._inbox[0][0] - self.now))

    async def _rest(self, seconds: float, spins: bool = False) -> None:
        await asyncio.sleep(seconds)
        await self._going.wait()
        if spins:
            self.spins_at = self.now
            await asyncio.Event().wait()

    def _take(self, core: EngineLoop) -> bool:
        taken = False
        while self._inbox and self._inbox[0][0] <= self.now + 1e-9:
            message = self._inbox.popleft()[1]
            if not isinstance(message, messages.LoadModel):
                apply_message(core, message)
                taken = True
        return taken

    async def _tokenize(self, texts: asyncio.Queue[messages.TokenizeText]) -> None:
        while True:
            message = await texts.get()
            await self._rest(_WAY + 0.001 * (1 + len(message.text)))
            if CURSED in message.text:
                asyncio.get_running_loop().call_soon(self.die, "cursed")
                await asyncio.Event().wait()
            self._emit(
                messages.TextTokens.of(
                    message.call, tuple(LETTERS.index(letter) for letter in message.text), message.long
                )
            )

    async def _pulse(self) -> None:
        while True:
            await self._rest(1.0)
            self._emit(self._runner.pulse)

    def _emit(self, message: messages.ServerMessage) -> None:
        self._outbox.put_nowait((self.now + _WAY, message))
