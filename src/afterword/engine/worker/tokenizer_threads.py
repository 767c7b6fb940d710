"""The threads of the engine's process that tokenize: one for short texts, one for long texts.

A short text thus never waits for a long one. A text that no client waits for any more is not begun, and one that is
under way ends after the part of it that is being tokenized.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from afterword.engine import messages
from afterword.system.tasks import vital_thread

Tokenizer = Callable[[str, bool], Iterable[Sequence[int]]]
"""A text and whether it may spell special tokens, to its tokens, part by part. Called by two threads at a time."""

_STACK, _STACK_PER_CHARACTER = 64 * 2**20, 512  # bytes: some pre-tokenizers call themselves for each character of a run

_NICENESS = 5  # of threads with long texts: where cores are scarce, forward passes have three times as much of one


def stack_bytes(text: str) -> int:
    """Bytes of stack of a thread that tokenizes a text, a whole number of pages."""
    return _STACK + (_STACK_PER_CHARACTER * len(text) + 4095) // 4096 * 4096


class TokenizerThreads:
    """Tokenizes what it is told to. `parts` counts what has been done of short texts and of long ones."""

    def __init__(self, tokenize: Tokenizer, send: Callable[[messages.TextTokens], None]) -> None:
        self.parts = [0, 0]
        self._tokenize = tokenize
        self._send = send
        self._wanted: set[int] = set()
        self._short: queue.SimpleQueue[messages.TokenizeText] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[messages.TokenizeText] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the threads. No other thread may be started at the same time."""
        threading.stack_size(_STACK)
        vital_thread(self._answer_short, name="tokenizer")
        threading.stack_size(0)
        vital_thread(self._answer_long, name="tokenizer of long texts")

    def add(self, message: messages.TokenizeText) -> None:
        """Tokenize a text after those of its kind that were told before."""
        self._wanted.add(message.call)
        (self._long if message.long else self._short).put(message)

    def cancel(self, call: int) -> None:
        """No client waits for a text any more."""
        self._wanted.discard(call)

    def _answer_short(self) -> NoReturn:
        while True:
            self._answer(self._short.get())

    def _answer_long(self) -> NoReturn:
        """Each long text has a thread of its own: the memory that its stack has taken is free after it."""
        while True:
            message = self._long.get()
            threading.stack_size(stack_bytes(message.text))
            vital_thread(self._answer_slowly, message, name="tokenizer of a long text").join()

    def _answer_slowly(self, message: messages.TokenizeText) -> None:
        if sys.platform == "linux":  # the only system where a thread has a niceness of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        self._answer(message)

    def _answer(self, message: messages.TokenizeText) -> None:
        ids = array("i")
        parts = iter(self._tokenize(message.text, message.special))
        while message.call in self._wanted and (part := next(parts, None)) is not None:
            ids.extend(part)
            self.parts[message.long] += 1
        wanted = message.call in self._wanted
        self._wanted.discard(message.call)
        self.parts[message.long] += 1
        self._send(messages.TextTokens.of(message.call, ids if wanted else (), message.long))
