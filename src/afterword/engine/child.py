"""The engine's process: reads frames, runs passes, writes frames. It ends when its parent does.

Which library computes is an argument. Its threads: one reads, so that a cancel is seen between two passes; two
tokenize (`tokenizing`); one pulses; the main one computes.
"""

from __future__ import annotations

import ctypes
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import msgspec

from afterword.engine import frames
from afterword.engine.core.batch import Batch, Logits, Runner
from afterword.engine.core.loop import Loop
from afterword.engine.protocol import Card
from afterword.engine.tokenizing import Tokenizer, Tokenizing
from afterword.errors import AfterwordError

Tell = Callable[[float], None]
"""Is told the share of the model that has been loaded."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_IDLE = 0.5  # seconds
_PULSE = 1.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, ready to compute. `team`: see `Loop`."""

    runner: Runner
    card: Card
    tokenize: Tokenizer
    team: int | None = None


def serve(load: Callable[[frames.Open, Tell], Loaded]) -> None:
    """Be the engine that hears and speaks through the sockets whose file descriptors are the arguments.

    `load` may raise `SettingError`; its sentence goes to the parent.
    """
    _follow_parent()
    _keep_memory_private()
    hears, speaks = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    _Child(hears, speaks).main(load)


class Gauge:
    """A runner that is watched: what has been computed, and what is being computed now. One thread runs it."""

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots, self.chunk, self.grid = runner.slots, runner.chunk, runner.grid
        self.least_shared, self.rewinds = runner.least_shared, runner.rewinds
        self.held = runner.held
        self._runner = runner
        self._clock = clock
        self._passes = self._tokens = self._largest = 0
        self._slowest = 0.0

    def run(self, batch: Batch) -> Logits:
        """See `core.batch.Runner`."""
        start, tokens = self._clock(), sum(len(row.tokens) for row in batch.rows)
        self._tokens = tokens
        logits = self._runner.run(batch)
        self._slowest = max(self._slowest, self._clock() - start)
        self._largest = max(self._largest, tokens)
        self._passes, self._tokens = self._passes + 1, 0
        return logits

    def pulse(self) -> frames.Pulse:
        """How it fares; from any thread."""
        return frames.Pulse(self._passes, self._tokens, self._largest, self._slowest)


def apply(loop: Loop, message: frames.ToEngine) -> None:
    """Tell a loop what the parent says of a job."""
    match message:
        case frames.Start():
            loop.start(message.run, message.job)
        case frames.Drop():
            loop.drop(message.run, message.sample)
        case frames.Close():
            loop.close(message.run)
        case _:
            raise AssertionError(f"not a message for a running engine: {type(message).__name__}")


class _Child:
    """Owner of the sockets to the parent."""

    def __init__(self, hears: socket.socket, speaks: socket.socket) -> None:
        self._speaks = speaks
        self._gauge: Gauge | None = None
        self._loaded = 0.0
        self._stream = hears.makefile("rb")
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[frames.ToEngine] = queue.SimpleQueue()
        self._tokenizing: Tokenizing | None = None

    def main(self, load: Callable[[frames.Open, Tell], Loaded]) -> None:
        """Load the model that the first frame names, then work until the parent is gone."""
        body = frames.read(self._stream)
        settings = frames.unpack_to_engine(body) if body else None
        if not isinstance(settings, frames.Open):
            return
        threading.Thread(target=self._pulse, daemon=True).start()
        try:
            loaded = load(settings, self._tell)
        except AfterwordError as error:
            self._send(frames.Failed(error.message))
            return
        self._send(frames.Ready(loaded.card))
        self._tokenizing = Tokenizing(loaded.tokenize, self._send)
        threading.Thread(target=self._read, args=(self._tokenizing,), daemon=True).start()
        self._tokenizing.start()
        self._gauge = Gauge(loaded.runner)
        self._work(Loop(self._gauge, threads=settings.threads, team=loaded.team))

    def _read(self, tokenizing: Tokenizing) -> NoReturn:
        while body := frames.read(self._stream):
            match message := frames.unpack_to_engine(body):
                case frames.Tokenize():
                    tokenizing.add(message)
                case frames.Forget():
                    tokenizing.forget(message.call)
                case _:
                    self._jobs.put(message)
        os._exit(0)  # the parent is gone, and a pass may be running: nothing is worth waiting for

    def _tell(self, share: float) -> None:
        self._loaded = share  # the next pulse says it

    def _pulse(self) -> NoReturn:
        while True:
            time.sleep(_PULSE)
            pulse = self._gauge.pulse() if self._gauge else frames.Pulse(0, 0, 0, 0.0, self._loaded)
            short, long = self._tokenizing.parts if self._tokenizing else (0, 0)
            self._send(msgspec.structs.replace(pulse, parts=(short, long)))

    def _work(self, loop: Loop) -> NoReturn:
        idle = True
        while True:
            changed = self._take(loop, wait=idle)
            steps = loop.step()
            idle = steps is None
            if steps or changed:
                self._send(frames.Pass(steps or {}, loop.load(), loop.meter()))

    def _take(self, loop: Loop, wait: bool) -> bool:
        """Apply what has come in; wait for something when idle. Returns whether anything had."""
        taken = False
        while True:
            try:
                message = self._wait(loop) if wait and not taken else self._jobs.get_nowait()
            except queue.Empty:
                return taken
            taken = True
            apply(loop, message)

    def _wait(self, loop: Loop) -> frames.ToEngine:
        """The next message. After a while without any, make sure that nothing was mixed up: better die than lie."""
        try:
            return self._jobs.get(timeout=_IDLE)
        except queue.Empty:
            loop.check()
            return self._jobs.get()

    def _send(self, message: frames.FromEngine) -> None:
        data = frames.pack(message)
        with self._sending:
            self._speaks.sendall(data)


def _follow_parent() -> None:
    """Leave signals to the parent, and die with it (the closed socket says the same where this is missing)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _keep_memory_private() -> None:
    """No core file may hold a prompt, and no process of the same user may look at one here."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
