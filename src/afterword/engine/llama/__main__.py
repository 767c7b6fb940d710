"""The engine's process: reads frames, runs passes, writes frames. It ends when its parent does.

Three threads: one reads, so that a cancel is seen between two passes; one tokenizes, with a stack large
enough for llama.cpp's recursive pre-tokenizers; the main one computes.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import sys
import threading
from typing import NoReturn

from afterword.engine import frames
from afterword.engine.core.loop import Loop
from afterword.engine.llama import library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.llama.vocabulary import Vocabulary, make_card
from afterword.errors import AfterwordError

_TOKENIZER_STACK = 512 * 2**20
_PR_SET_PDEATHSIG = 1


class Child:
    """Owner of the socket to the parent."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link
        self._stream = link.makefile("rb")
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[frames.ToEngine] = queue.SimpleQueue()
        self._texts: queue.SimpleQueue[frames.Tokenize] = queue.SimpleQueue()

    def main(self) -> None:
        """Load the model that the first frame names, then work until the parent is gone."""
        body = frames.read(self._stream)
        settings = frames.unpack_to_engine(body) if body else None
        if not isinstance(settings, frames.Open):
            return
        try:
            library.start(settings.verbose)
            runner = LlamaRunner(settings)
            card, vocabulary = make_card(runner, settings)
        except AfterwordError as error:
            self._send(frames.Failed(error.message))
            return
        self._send(frames.Ready(card))
        threading.stack_size(_TOKENIZER_STACK)
        threading.Thread(target=self._tokenize, args=(vocabulary,), daemon=True).start()
        threading.stack_size(0)
        threading.Thread(target=self._read, daemon=True).start()
        self._work(Loop(runner))

    def _read(self) -> NoReturn:
        while body := frames.read(self._stream):
            message = frames.unpack_to_engine(body)
            if isinstance(message, frames.Tokenize):
                self._texts.put(message)
            else:
                self._jobs.put(message)
        os._exit(0)  # the parent is gone, and a pass may be running: nothing is worth waiting for

    def _tokenize(self, vocabulary: Vocabulary) -> None:
        while True:
            call = self._texts.get()
            self._send(frames.Tokens(call.call, vocabulary.tokenize(call.text, call.special)))

    def _work(self, loop: Loop) -> None:
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
                message = self._jobs.get(block=wait and not taken)
            except queue.Empty:
                return taken
            taken = True
            if isinstance(message, frames.Start):
                loop.start(message.run, message.job)
            elif isinstance(message, frames.Drop):
                loop.drop(message.run, message.sample)
            elif isinstance(message, frames.Close):
                loop.close(message.run)

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


if __name__ == "__main__":
    _follow_parent()
    Child(socket.socket(fileno=int(sys.argv[1]))).main()
