"""The engine's process: reads frames, runs passes, writes frames. It ends when its parent does.

Which library computes is an argument. Three threads: one reads, so that a cancel is seen between two passes; one
tokenizes, with a stack large enough for recursive pre-tokenizers; the main one computes.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from afterword.engine import frames
from afterword.engine.core.batch import Runner
from afterword.engine.core.loop import Loop
from afterword.engine.protocol import Card
from afterword.errors import AfterwordError

Tokenizer = Callable[[str, bool], tuple[int, ...]]

_TOKENIZER_STACK = 512 * 2**20
_PR_SET_PDEATHSIG = 1
_IDLE = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, ready to compute. `tokenize` may be called from any thread."""

    runner: Runner
    card: Card
    tokenize: Tokenizer


def serve(load: Callable[[frames.Open], Loaded]) -> None:
    """Be the engine at the other end of the socket whose file descriptor is the first argument.

    `load` may raise `SettingError`; its sentence goes to the parent.
    """
    _follow_parent()
    _Child(socket.socket(fileno=int(sys.argv[1]))).main(load)


class _Child:
    """Owner of the socket to the parent."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._stream = link.makefile("rb")
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[frames.ToEngine] = queue.SimpleQueue()
        self._texts: queue.SimpleQueue[frames.Tokenize] = queue.SimpleQueue()

    def main(self, load: Callable[[frames.Open], Loaded]) -> None:
        """Load the model that the first frame names, then work until the parent is gone."""
        body = frames.read(self._stream)
        settings = frames.unpack_to_engine(body) if body else None
        if not isinstance(settings, frames.Open):
            return
        try:
            loaded = load(settings)
        except AfterwordError as error:
            self._send(frames.Failed(error.message))
            return
        self._send(frames.Ready(loaded.card))
        threading.stack_size(_TOKENIZER_STACK)
        threading.Thread(target=self._tokenize, args=(loaded.tokenize,), daemon=True).start()
        threading.stack_size(0)
        threading.Thread(target=self._read, daemon=True).start()
        self._work(Loop(loaded.runner))

    def _read(self) -> NoReturn:
        while body := frames.read(self._stream):
            message = frames.unpack_to_engine(body)
            if isinstance(message, frames.Tokenize):
                self._texts.put(message)
            else:
                self._jobs.put(message)
        os._exit(0)  # the parent is gone, and a pass may be running: nothing is worth waiting for

    def _tokenize(self, tokenize: Tokenizer) -> NoReturn:
        while True:
            call = self._texts.get()
            self._send(frames.Tokens(call.call, tokenize(call.text, call.special)))

    def _work(self, loop: Loop) -> NoReturn:
        idle = True
        while True:
            changed = self._take(loop, wait=idle)
            steps = loop.step()
            idle = steps is None
            if steps or changed:
                self._send(frames.Pass(steps or {}, loop.load()))

    def _take(self, loop: Loop, wait: bool) -> bool:
        """Apply what has come in; wait for something when idle. Returns whether anything had."""
        taken = False
        while True:
            try:
                message = self._wait(loop) if wait and not taken else self._jobs.get_nowait()
            except queue.Empty:
                return taken
            taken = True
            match message:
                case frames.Start():
                    loop.start(message.run, message.job)
                case frames.Drop():
                    loop.drop(message.run, message.sample)
                case frames.Close():
                    loop.close(message.run)
                case _:
                    raise AssertionError(f"not a message for a running engine: {type(message).__name__}")

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
            self._link.sendall(data)


def _follow_parent() -> None:
    """Leave signals to the parent, and die with it (the closed socket says the same where this is missing)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
