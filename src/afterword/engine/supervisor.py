"""Runs an engine in a process of its own, and is that engine for everyone above.

Every job is kept here until it ends, so a crash of the process loses none: a new one gets them all again, and what a
job had brought already is left out the second time. This file knows frames and processes; it does not know which
library computes, nor what a job is for.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from typing import Literal

import msgspec

from afterword.engine import frames
from afterword.engine.protocol import Card, Job, Load, Step
from afterword.errors import EngineDied, Overloaded, SettingError

LLAMA = (sys.executable, "-m", "afterword.engine.llama")
State = Literal["starting", "ready", "restarting", "closed"]

_CRASHES = 2  # a run that was being computed in so many crashes is not tried again
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0  # seconds between attempts to restart


class Supervisor:
    """An `Engine` whose work is done by a child process. One event loop calls everything."""

    def __init__(self, settings: frames.Open, *, max_queue: int = 512, command: Sequence[str] = LLAMA) -> None:
        self._settings = settings
        self._max_queue = max_queue
        self._command = command
        self._names = itertools.count()
        self._runs: dict[int, _Run] = {}
        self._calls: dict[int, asyncio.Future[tuple[int, ...]]] = {}
        self._card: Card | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._load = Load()
        self.state: State = "starting"
        self.restarts = 0

    # ---- what the rooms above see

    @property
    def card(self) -> Card:
        """Facts about the model. Only after `open`."""
        assert self._card is not None
        return self._card

    @property
    def load(self) -> Load:
        """What is running and waiting."""
        if self._writer is None:
            return Load(self._load.sequences, 0, sum(run.job.samples for run in self._runs.values()))
        return self._load

    def start(self, job: Job) -> _Run:
        """Accept a job; see `protocol.Engine`."""
        if self.state == "closed":
            raise Overloaded("The server is shutting down.")
        if len(self._runs) >= self.card.sequences + self._max_queue:
            raise Overloaded("The server is overloaded: too many requests are waiting. Please try again later.")
        run = _Run(self, next(self._names), job)
        self._runs[run.name] = run
        if self._writer is not None:
            self._send(frames.Start(run.name, job))
        return run

    async def tokenize(self, text: str, special: bool) -> tuple[int, ...]:
        """Tokens of a text; see `protocol.Engine`. Raises `Overloaded` while the engine is being replaced."""
        if self.state == "restarting":
            raise Overloaded("The engine is being restarted. Please try again.")
        call = next(self._names)
        future: asyncio.Future[tuple[int, ...]] = asyncio.get_running_loop().create_future()
        self._calls[call] = future
        try:
            self._send(frames.Tokenize(call, text, special))
            return await future
        finally:
            del self._calls[call]

    # ---- life

    async def open(self) -> None:
        """Start the process and load the model. Raises `SettingError` if that fails."""
        await self._launch()
        self.state = "ready"

    async def close(self) -> None:
        """End the process and every run."""
        self.state = "closed"
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        await self._end_process()
        for run in list(self._runs.values()):
            self._fail(run, Overloaded("The server is shutting down."))

    async def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*self._command, str(theirs.fileno())], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
            )
        reader, writer = await asyncio.open_connection(sock=ours, limit=2**20)
        writer.write(frames.pack(self._settings))
        first = await _receive(reader)
        if not isinstance(first, frames.Ready):
            writer.close()
            await self._end_process()
            raise SettingError(first.message if isinstance(first, frames.Failed) else self._last_words())
        self._card, self._writer = first.card, writer
        self._load = Load(first.card.sequences)
        self._reader = asyncio.create_task(self._listen(reader))

    def _last_words(self) -> str:
        code = self._process.returncode if self._process else None
        return f"The engine's process ended while it was loading {self._settings.path} (exit status {code})."

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while (message := await _receive(reader)) is not None:
            if isinstance(message, frames.Pass):
                self._take(message)
            elif isinstance(message, frames.Tokens):
                call = self._calls.get(message.call)
                if call is not None and not call.done():
                    call.set_result(message.ids)
        await self._recover()

    async def _recover(self) -> None:
        """The process has died: start another and give it the runs again.

        Not those that may have killed it, nor, where numbers can differ a second time, those that have brought any.
        """
        self.state = "restarting"
        for run in list(self._runs.values()):
            if run.crashed() == _CRASHES or (run.brought and self.card.promise == "none"):
                self._fail(run, EngineDied())
        for call in self._calls.values():
            if not call.done():
                call.set_exception(EngineDied())
        self._load = Load(self.card.sequences)
        pause = _FIRST_PAUSE
        while True:
            await self._end_process()
            await asyncio.sleep(pause)
            self.restarts += 1
            try:
                await self._launch()
            except (SettingError, OSError):
                pause = min(pause * 2, _LONGEST_PAUSE)
                continue
            self.state = "ready"
            for run in self._runs.values():
                self._send(frames.Start(run.name, run.job))
            return

    async def _end_process(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None:
            self._process.kill()
            await asyncio.to_thread(self._process.wait)

    # ---- runs

    def _take(self, message: frames.Pass) -> None:
        self._load = message.load
        for name, step in message.steps.items():
            run = self._runs.get(name)
            if run is not None:
                run.put(step)
                if run.ended:
                    del self._runs[name]

    def drop(self, run: _Run, sample: int) -> None:
        """End one sample of a run."""
        if run.name in self._runs and self._writer is not None:
            self._send(frames.Drop(run.name, sample))

    def end(self, run: _Run) -> None:
        """Forget a run."""
        if self._runs.pop(run.name, None) is not None and self._writer is not None:
            self._send(frames.Close(run.name))

    def _fail(self, run: _Run, error: Exception) -> None:
        del self._runs[run.name]
        run.fail(error)

    def _send(self, message: frames.ToEngine) -> None:
        if self._writer is None:
            raise EngineDied()
        self._writer.write(frames.pack(message))


class _Run:
    """One job under way; see `protocol.Run`."""

    def __init__(self, supervisor: Supervisor, name: int, job: Job) -> None:
        self.name = name
        self.job = job
        self._supervisor = supervisor
        self._open = set(range(job.samples))
        self._begun = False
        self._crashes = 0
        self._told: Counter[int | None] = Counter()  # tokens by sample; under None the prompt's
        self._again: Counter[int | None] = Counter()  # as many of them will come a second time
        self._steps: asyncio.Queue[Step | Exception | None] = asyncio.Queue()  # None: nothing more will come

    @property
    def brought(self) -> bool:
        """Whether anyone may have seen a token of it."""
        return self._told.total() > 0

    @property
    def ended(self) -> bool:
        """Whether every sample has ended."""
        return not self._open

    def put(self, step: Step) -> None:
        """Take a step from the engine."""
        self._begun = True
        if self._crashes:
            step = self._new(step)
        self._told[None] += len(step.scored)
        self._told.update(sample for sample, _ in step.sampled)
        self._open.difference_update(sample for sample, _ in step.ended)
        self._steps.put_nowait(step)
        if self.ended:
            self._steps.put_nowait(None)

    def crashed(self) -> int:
        """The engine has died: in how many crashes this run was being computed."""
        self._crashes += self._begun
        self._begun = False
        self._again = self._told.copy()
        return self._crashes

    def _new(self, step: Step) -> Step:
        """What of a step has not been told before a crash. Samples that had ended are ended again."""
        for sample in {sample for sample, _ in step.sampled} - self._open:
            self._supervisor.drop(self, sample)
        known, self._again[None] = self._again[None], max(0, self._again[None] - len(step.scored))
        sampled = tuple(pair for pair in step.sampled if pair[0] in self._open and not self._repeats(pair[0]))
        ended = tuple(pair for pair in step.ended if pair[0] in self._open)
        return Step(step.scored[known:], sampled, ended)

    def _repeats(self, sample: int) -> bool:
        """Whether a sample's next token has been told; it counts as taken."""
        self._again[sample] -= 1
        return self._again[sample] >= 0

    def fail(self, error: Exception) -> None:
        """End with an error."""
        self._steps.put_nowait(error)

    async def __aiter__(self) -> AsyncIterator[Step]:
        while (step := await self._steps.get()) is not None:
            if isinstance(step, Exception):
                raise step
            yield step

    def drop(self, sample: int) -> None:
        """End one sample now."""
        if sample in self._open:
            self._open.discard(sample)
            self._supervisor.drop(self, sample)
            if self.ended:
                self.close()

    def close(self) -> None:
        """End the whole job now."""
        self._open.clear()
        self._supervisor.end(self)
        self._steps.put_nowait(None)  # whoever is waiting for a step, waits no longer


async def _receive(reader: asyncio.StreamReader) -> frames.FromEngine | None:
    """The next message, or None when the process is gone or talks nonsense, which is no better."""
    try:
        header = await reader.readexactly(frames.HEADER.size)
        size = frames.HEADER.unpack(header)[0]
        if size > frames.LIMIT:
            return None
        return frames.unpack_from_engine(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError, UnicodeDecodeError):
        return None
