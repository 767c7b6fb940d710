"""A simulated worker process: the real engine loop, scheduler and slots, in the same event loop as the server.

`FakeProcess` replaces `afterword.engine.parent.worker_process.WorkerLink`. The simulation can make it die, stop, hang
and stall.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from history_runner import VOCABULARY, HistoryRunner

from afterword.engine import messages
from afterword.engine.core.draft_model import DraftModel
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.core.verification import can_verify
from afterword.engine.protocol import ModelInfo
from afterword.engine.worker.worker_main import PassMonitor, apply_message

PREFILL_CRASH, DECODE_CRASH, TOKENIZER_CRASH = "!", "#", "?"
"""Letters that crash the worker: during prefill, some tokens later during decode, and in the tokenizer."""
LETTERS = "".join(chr(65 + token) for token in range(VOCABULARY)) + PREFILL_CRASH + DECODE_CRASH + TOKENIZER_CRASH
_CRASH_TOKENS = 6  # tokens after DECODE_CRASH until the crash
_LATENCY = 0.001  # seconds that a message takes between server and worker


class CrashError(Exception):
    """A computed token has crashed the worker."""


def _fail(line: str) -> None:
    raise AssertionError(line)


@dataclass
class Machine:
    """Starts workers; owns their settings and speeds.

    `failing`: how many of the next ones fail to load the model. `accepted`: accepted tokens of drafts.
    """

    random: Random
    settings: messages.LoadModel
    promise: str = "exact"
    load_seconds: float = 1.0
    pass_seconds: float = 0.01
    token_seconds: float = 0.002
    failing: int = 0
    accepted: int = 0
    processes: list[FakeProcess] = field(default_factory=list)
    on_pass: Callable[[FakeProcess, ForwardBatch], None] = lambda *_: None
    record: Callable[..., None] = lambda *_: None

    async def spawn(self, _: object) -> FakeProcess:
        """Start a worker; see `afterword.engine.parent.worker_process.SpawnWorker`."""
        self.processes.append(FakeProcess(self, self.failing > 0))
        self.failing = max(0, self.failing - 1)
        return self.processes[-1]

    def model_info(self, runner: HistoryRunner) -> ModelInfo:
        pieces = tuple(letter.encode() for letter in LETTERS)
        settings = self.settings
        return ModelInfo(
            *(0, settings.context, settings.sequences, pieces, (0,), None, 0, False, False, 1, None, "fp_sim"),
            promise=self.promise,  # type: ignore[arg-type]
            verifies_drafts=can_verify(runner),
        )


class TimedRunner(HistoryRunner):
    """A runner that takes time for each pass and crashes the worker at some tokens.

    `run` advances its clock by `clock_offset`. The process sleeps for as long after the pass.
    """

    def __init__(self, machine: Machine, process: FakeProcess) -> None:
        settings = machine.settings
        super().__init__(
            settings.sequences,
            settings.chunk,
            grid=settings.grid,
            can_truncate=not settings.snapshot_bytes,
            max_snapshots=settings.snapshot_bytes,
            joins_prompts=settings.joins_prompts,
        )
        self.clock_offset = 0.0  # seconds by which this worker's clock is ahead of the event loop's
        self.monitor: PassMonitor | None = None
        self.last_heartbeat = messages.Heartbeat(0, 0, 0, 0.0)
        self._machine = machine
        self._process = process

    def clock(self) -> float:
        return asyncio.get_running_loop().time() + self.clock_offset

    def run(self, batch: ForwardBatch) -> Logits:
        assert self.monitor is not None
        self.last_heartbeat = self.monitor.heartbeat()
        tokens = sum(len(entry.tokens) for entry in batch.entries)
        machine = self._machine
        self.clock_offset = (machine.pass_seconds + tokens * machine.token_seconds) * machine.random.uniform(0.7, 1.3)
        machine.on_pass(self._process, batch)
        logits = super().run(batch)
        if any(self._crashes(slot) for slot in {entry.slot for entry in batch.entries}):
            raise CrashError
        return logits

    def _crashes(self, slot: int) -> bool:
        state = self.state[slot]
        if LETTERS.index(PREFILL_CRASH) in state:
            return True
        letter = LETTERS.index(DECODE_CRASH)
        return letter in state and len(state) - state.index(letter) > _CRASH_TOKENS


class FakeProcess:
    """A simulated worker; see `afterword.engine.parent.worker_process.WorkerLink`.

    `stopped_at`: the time since which the process is stopped. `hangs_at`: the time since which a pass does not end.
    """

    pid = None

    def __init__(self, machine: Machine, fails: bool) -> None:
        self.alive = True
        self.engine_loop: EngineLoop | None = None
        self.stopped_at: float | None = None
        self.hangs_at: float | None = None
        self.died_at: float | None = None
        self._machine = machine
        self._fails = fails
        self._hangs_next = False
        self._runner = TimedRunner(machine, self)
        self._inbox: deque[tuple[float, messages.WorkerMessage]] = deque()
        self._outbox: asyncio.Queue[tuple[float, messages.ServerMessage | None]] = asyncio.Queue()
        self._tokenizer_queues: tuple[asyncio.Queue[messages.TokenizeText], ...] = (asyncio.Queue(), asyncio.Queue())
        self._message_arrived = asyncio.Event()
        self._not_stopped = asyncio.Event()
        self._not_stopped.set()
        tokenizers = (self._tokenize(texts) for texts in self._tokenizer_queues)
        self.tasks = [asyncio.create_task(each) for each in (self._compute(), self._send_heartbeats(), *tokenizers)]

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    # ---- the interface for the server

    def send(self, message: messages.WorkerMessage) -> None:
        if isinstance(message, messages.TokenizeText):
            self._tokenizer_queues[message.long].put_nowait(message)  # tokenizer threads do not wait for passes
            return
        if isinstance(message, messages.CancelTokenize):
            return  # all texts are short, so their tokens arrive soon
        self._inbox.append((self.now + _LATENCY, message))
        self._message_arrived.set()

    async def receive(self) -> messages.ServerMessage | None:
        ready, message = await self._outbox.get()
        await asyncio.sleep(max(0.0, ready - self.now))
        return message

    def kill(self) -> None:
        if self.alive and self.stopped_at is None and self.hangs_at is None:
            raise AssertionError("a healthy worker was killed")
        self.die("killed")

    async def wait_ended(self) -> int | None:
        self.die("ended")
        await asyncio.sleep(0.01)
        return -9

    # ---- faults

    def die(self, why: str) -> None:
        """End the process and everything that it computes. Messages that it has sent still arrive."""
        if self.alive:
            self.alive, self.died_at = False, self.now
            self._machine.record("died", self._machine.processes.index(self), why)
            for task in self.tasks:
                task.cancel()
            self._outbox.put_nowait((self.now + _LATENCY, None))

    def stop(self) -> None:
        """Stop the process for ever."""
        self.stopped_at = self.now
        self._not_stopped.clear()

    def stall(self, seconds: float) -> None:
        """Stop the process for this many seconds."""
        if self._not_stopped.is_set():
            self._not_stopped.clear()
            asyncio.get_running_loop().call_later(seconds, self._continue)

    def _continue(self) -> None:
        if self.stopped_at is None:
            self._not_stopped.set()

    def hang(self) -> None:
        """Make the next pass endless."""
        self._hangs_next = True

    # ---- the work of the process

    async def _compute(self) -> None:
        await self._sleep(self._machine.load_seconds)
        if self._fails:
            self._send_to_server(messages.LoadFailure("The simulated model cannot be loaded."))
            return
        self._send_to_server(messages.ModelReady(self._machine.model_info(self._runner)))
        monitor = self._runner.monitor = PassMonitor(self._runner, self._runner.clock)
        self.engine_loop = EngineLoop(monitor, self._runner.clock)
        if self._machine.settings.speculate == "ngram":
            self.engine_loop.draft_ngrams()
        if self._machine.settings.draft:
            runner = HistoryRunner(self._machine.settings.sequences, self._machine.settings.chunk)
            model = DraftModel(runner, self._machine.settings.context, VOCABULARY, self._runner.clock)
            self.engine_loop.use_draft_model(model, _fail)
        try:
            while True:
                await self._iterate(self.engine_loop)
        except CrashError:
            self.die("crashed by a token")

    async def _iterate(self, loop: EngineLoop) -> None:
        changed = self._take(loop)
        self._runner.clock_offset = 0.0
        computed = len(self._runner.batches)
        steps = loop.step()
        self._machine.accepted += loop.pass_stats().accepted_tokens
        if len(self._runner.batches) > computed:
            await self._sleep(self._runner.clock_offset, hangs=self._hangs_next)
        self._runner.clock_offset = 0.0
        if self._runner.monitor:
            self._runner.last_heartbeat = self._runner.monitor.heartbeat()
        if steps or changed:
            self._send_to_server(messages.PassDone(steps or {}, loop.load()))
        if steps is None and not changed:
            await self._wait()

    async def _wait(self) -> None:
        while not self._inbox:
            self._message_arrived.clear()
            await self._message_arrived.wait()
        await self._sleep(max(0.0, self._inbox[0][0] - self.now))

    async def _sleep(self, seconds: float, hangs: bool = False) -> None:
        await asyncio.sleep(seconds)
        await self._not_stopped.wait()
        if hangs:
            self.hangs_at = self.now
            await asyncio.Event().wait()

    def _take(self, loop: EngineLoop) -> bool:
        taken = False
        while self._inbox and self._inbox[0][0] <= self.now + 1e-9:
            message = self._inbox.popleft()[1]
            if not isinstance(message, messages.LoadModel):
                apply_message(loop, message)
                taken = True
        return taken

    async def _tokenize(self, texts: asyncio.Queue[messages.TokenizeText]) -> None:
        while True:
            message = await texts.get()
            await self._sleep(_LATENCY + 0.001 * (1 + len(message.text)))
            if TOKENIZER_CRASH in message.text:
                asyncio.get_running_loop().call_soon(self.die, "crashed by a text")
                await asyncio.Event().wait()
            self._send_to_server(
                messages.TextTokens.of(
                    message.call, tuple(LETTERS.index(letter) for letter in message.text), message.long
                )
            )

    async def _send_heartbeats(self) -> None:
        while True:
            await self._sleep(1.0)
            self._send_to_server(self._runner.last_heartbeat)

    def _send_to_server(self, message: messages.ServerMessage) -> None:
        self._outbox.put_nowait((self.now + _LATENCY, message))
