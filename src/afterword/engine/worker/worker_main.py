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

from afterword.engine import messages
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits, Runner
from afterword.engine.protocol import ModelInfo
from afterword.engine.worker.tokenizer_threads import Tokenizer, TokenizerThreads
from afterword.errors import AfterwordError, EngineError
from afterword.system.tasks import switch_threads_soon, vital_thread

ReportProgress = Callable[[float], None]
"""Is told the share of the model that has been loaded."""

_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE = 1, 4
_CREDENTIALS = struct.Struct("3i")  # of who made a socket: the ids of the process, its user and its group
_IDLE_SECONDS = 0.5  # seconds
_HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model, ready to compute. `thread_pool`: see `EngineLoop`.

    `check` raises `EngineError` when what it was loaded from has changed: nothing may be computed with it any more. It
    is called from any thread, each second and after each pass.
    """

    runner: Runner
    model_info: ModelInfo
    tokenize: Tokenizer
    thread_pool: int | None = None
    check: Callable[[], None] = lambda: None


def serve(load: Callable[[messages.LoadModel, ReportProgress], LoadedModel]) -> None:
    """Be the engine that hears and speaks through the sockets whose file descriptors are the arguments.

    `load` may raise `SettingError`; its sentence goes to the parent.
    """
    hears, speaks = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    _die_with_parent(hears)
    _keep_memory_private()
    _Worker(hears, speaks).main(load)


class PassMonitor:
    """A runner that is watched: what has been computed, and what is being computed now. One thread runs it."""

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots, self.chunk, self.grid = runner.slots, runner.chunk, runner.grid
        self.min_shared_tokens, self.can_truncate = runner.min_shared_tokens, runner.can_truncate
        self.cached_tokens = runner.cached_tokens
        self._runner = runner
        self._clock = clock
        self._passes = self._tokens = self._largest = 0
        self._slowest = 0.0

    def run(self, batch: ForwardBatch) -> Logits:
        """See `core.batch.Runner`."""
        start, tokens = self._clock(), sum(len(row.tokens) for row in batch.entries)
        self._tokens = tokens
        logits = self._runner.run(batch)
        self._slowest = max(self._slowest, self._clock() - start)
        self._largest = max(self._largest, tokens)
        self._passes, self._tokens = self._passes + 1, 0
        return logits

    def heartbeat(self) -> messages.Heartbeat:
        """How it fares; from any thread."""
        return messages.Heartbeat(self._passes, self._tokens, self._largest, self._slowest)


def apply_message(loop: EngineLoop, message: messages.WorkerMessage) -> None:
    """Tell a loop what the parent says of a job."""
    match message:
        case messages.StartJob():
            loop.start(message.run, message.job)
        case messages.DropSample():
            loop.drop(message.run, message.sample)
        case messages.CloseJob():
            loop.close(message.run)
        case messages.PauseJob():
            loop.pause(message.run)
        case messages.ResumeJob():
            loop.resume(message.run)
        case _:
            raise AssertionError(f"not a message for a running engine: {type(message).__name__}")


class _Worker:
    """Owner of the sockets to the parent."""

    def __init__(self, hears: socket.socket, speaks: socket.socket) -> None:
        self._speaks = speaks
        self._monitor: PassMonitor | None = None
        self._check: Callable[[], None] = lambda: None  # see `LoadedModel`
        self._loaded = 0.0
        self._stream = hears.makefile("rb")
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[messages.WorkerMessage] = queue.SimpleQueue()
        self._tokenizer_threads: TokenizerThreads | None = None

    def main(self, load: Callable[[messages.LoadModel, ReportProgress], LoadedModel]) -> None:
        """Load the model that the first frame names, then work until the parent is gone."""
        body = messages.read(self._stream)
        settings = messages.unpack_for_worker(body) if body else None
        if not isinstance(settings, messages.LoadModel):
            return
        switch_threads_soon()
        vital_thread(self._send_heartbeats, name="pulse")
        vital_thread(self._read, name="reader")  # also while loading: it sees that the parent is gone
        try:
            loaded = load(settings, self._report_progress)
        except AfterwordError as error:
            self._send(messages.LoadFailure(error.message))
            return
        self._check = loaded.check
        self._tokenizer_threads = TokenizerThreads(loaded.tokenize, self._send)
        self._tokenizer_threads.start()
        self._send(messages.ModelReady(loaded.model_info))
        self._monitor = PassMonitor(loaded.runner)
        self._work(EngineLoop(self._monitor, threads=settings.threads, team=loaded.thread_pool))

    def _read(self) -> NoReturn:
        while body := messages.read(self._stream):
            message = messages.unpack_for_worker(body)
            if not isinstance(message, messages.TokenizeText | messages.CancelTokenize):
                self._jobs.put(message)
                continue
            assert self._tokenizer_threads is not None, "a text came before the model was ready"
            if isinstance(message, messages.TokenizeText):
                self._tokenizer_threads.add(message)
            else:
                self._tokenizer_threads.cancel(message.call)
        os._exit(0)  # the parent is gone, and a pass or the loading may be running: nothing is worth waiting for

    def _report_progress(self, share: float) -> None:
        self._loaded = share  # the next pulse says it

    def _send_heartbeats(self) -> NoReturn:
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            self._end_if_changed()
            pulse = self._monitor.heartbeat() if self._monitor else messages.Heartbeat(0, 0, 0, 0.0, self._loaded)
            short, long = self._tokenizer_threads.parts if self._tokenizer_threads else (0, 0)
            self._send(msgspec.structs.replace(pulse, parts=(short, long)))

    def _work(self, loop: EngineLoop) -> NoReturn:
        idle = True
        while True:
            changed = self._take(loop, wait=idle)
            steps = loop.step()
            self._end_if_changed()  # before anything of the pass is told
            idle = steps is None
            if steps or changed:
                self._send(messages.PassDone(steps or {}, loop.load(), loop.pass_stats()))

    def _take(self, loop: EngineLoop, wait: bool) -> bool:
        """Apply what has come in; wait for something when idle. Returns whether anything had."""
        taken = False
        while True:
            try:
                message = self._wait(loop) if wait and not taken else self._jobs.get_nowait()
            except queue.Empty:
                return taken
            taken = True
            apply_message(loop, message)

    def _wait(self, loop: EngineLoop) -> messages.WorkerMessage:
        """The next message. After a while without any, make sure that nothing was mixed up: better die than lie."""
        try:
            return self._jobs.get(timeout=_IDLE_SECONDS)
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

    def _send(self, message: messages.ServerMessage) -> None:
        data = messages.pack(message)
        with self._sending:
            try:
                self._speaks.sendall(data)
            except OSError:
                os._exit(0)  # the parent is gone


def _die_with_parent(line: socket.socket) -> None:
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
