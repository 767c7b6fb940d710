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
import struct
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
from afterword.errors import AfterwordError, EngineError
from afterword.tasks import switch_threads_soon, vital_thread

Tell = Callable[[float], None]
"""Is told the share of the model that has been loaded."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_CREDENTIALS = struct.Struct("3i")  # of who made a socket: the ids of the process, its user and its group
_IDLE = 0.5  # seconds
_PULSE = 1.0


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, ready to compute. `team`: see `Loop`.

    `check` raises `EngineError` when what it was loaded from has changed: nothing may be computed with it any more. It
    is called from any thread, each second and after each pass.
    """

    runner: Runner
    card: Card
    tokenize: Tokenizer
    team: int | None = None
    check: Callable[[], None] = lambda: None


def serve(load: Callable[[frames.Open, Tell], Loaded]) -> None:
    """Be the engine that hears and speaks through the sockets whose file descriptors are the arguments.

    `load` may raise `SettingError`; its sentence goes to the parent.
    """
    hears, speaks = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    _follow_parent(hears)
    _keep_memory_private()
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
        case frames.Pause():
            loop.pause(message.run)
        case frames.Resume():
            loop.resume(message.run)
        case _:
            raise AssertionError(f"not a message for a running engine: {type(message).__name__}")


class _Child:
    """Owner of the sockets to the parent."""

    def __init__(self, hears: socket.socket, speaks: socket.socket) -> None:
        self._speaks = speaks
        self._gauge: Gauge | None = None
        self._check: Callable[[], None] = lambda: None  # see `Loaded`
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
        switch_threads_soon()
        vital_thread(self._pulse, name="pulse")
        vital_thread(self._read, name="reader")  # also while loading: it sees that the parent is gone
        try:
            loaded = load(settings, self._tell)
        except AfterwordError as error:
            self._send(frames.Failed(error.message))
            return
        self._check = loaded.check
        self._tokenizing = Tokenizing(loaded.tokenize, self._send)
        self._tokenizing.start()
        self._send(frames.Ready(loaded.card))
        self._gauge = Gauge(loaded.runner)
        self._work(Loop(self._gauge, threads=settings.threads, team=loaded.team))

    def _read(self) -> NoReturn:
        while body := frames.read(self._stream):
            message = frames.unpack_to_engine(body)
            if not isinstance(message, frames.Tokenize | frames.Forget):
                self._jobs.put(message)
                continue
            assert self._tokenizing is not None, "a text came before the model was ready"
            if isinstance(message, frames.Tokenize):
                self._tokenizing.add(message)
            else:
                self._tokenizing.forget(message.call)
        os._exit(0)  # the parent is gone, and a pass or the loading may be running: nothing is worth waiting for

    def _tell(self, share: float) -> None:
        self._loaded = share  # the next pulse says it

    def _pulse(self) -> NoReturn:
        while True:
            time.sleep(_PULSE)
            self._end_if_changed()
            pulse = self._gauge.pulse() if self._gauge else frames.Pulse(0, 0, 0, 0.0, self._loaded)
            short, long = self._tokenizing.parts if self._tokenizing else (0, 0)
            self._send(msgspec.structs.replace(pulse, parts=(short, long)))

    def _work(self, loop: Loop) -> NoReturn:
        idle = True
        while True:
            changed = self._take(loop, wait=idle)
            steps = loop.step()
            self._end_if_changed()  # before anything of the pass is told
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

    def _end_if_changed(self) -> None:
        """End the process if the model is no longer the one that the card describes; the parent starts another."""
        try:
            self._check()
        except EngineError as error:
            print(error.message, file=sys.stderr, flush=True)
            os._exit(1)

    def _send(self, message: frames.FromEngine) -> None:
        data = frames.pack(message)
        with self._sending:
            try:
                self._speaks.sendall(data)
            except OSError:
                os._exit(0)  # the parent is gone


def _follow_parent(line: socket.socket) -> None:
    """Leave signals to the parent, and die with it (the closed socket says the same where this is missing).

    `line` was made by the parent. A parent that died before the kernel was asked for its death sends no signal any
    more: then another process is the parent now.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        credentials = line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if os.getppid() != _CREDENTIALS.unpack(credentials)[0]:
            os._exit(0)


def _keep_memory_private() -> None:
    """No core file may hold a prompt, and no process of the same user may look at one here."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
