"""The worker's tokenizer threads: one for short texts and one for long texts.

A short text therefore never waits for a long one. A cancelled text is not started; if a thread is tokenizing it, the
thread stops after the current part.
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
"""Yields the token ids of a text, part by part. Two threads may call it at the same time.

Its arguments are the text, and whether text that spells a special token becomes that token.
"""

# Bytes of stack: some pre-tokenizers recurse once for each character of a run.
_STACK, _STACK_PER_CHARACTER = 64 * 2**20, 512

_NICENESS = 5  # of threads with long texts: where cores are scarce, forward passes get three times their share


def stack_bytes(text: str) -> int:
    """Bytes of stack for a thread that tokenizes a text, a whole number of 4 KiB pages."""
    return _STACK + (_STACK_PER_CHARACTER * len(text) + 4095) // 4096 * 4096


class TokenizerThreads:
    """Owns the tokenizer threads and their queues. The reader thread calls `add` and `cancel`.

    `parts` counts the finished parts: of short texts, of long texts. Each entry is written by one thread.
    """

    def __init__(self, tokenize: Tokenizer, send: Callable[[messages.TextTokens], None]) -> None:
        self.parts = [0, 0]
        self._tokenize = tokenize
        self._send = send
        self._wanted: set[int] = set()
        self._short: queue.SimpleQueue[messages.TokenizeText] = queue.SimpleQueue()
        self._long: queue.SimpleQueue[messages.TokenizeText] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the threads. No other thread may be started at the same time: the stack size is a global setting."""
        threading.stack_size(_STACK)
        vital_thread(self._answer_short, name="tokenizer")
        threading.stack_size(0)
        vital_thread(self._answer_long, name="tokenizer of long texts")

    def add(self, message: messages.TokenizeText) -> None:
        """Queue a text behind the earlier ones of its kind, short or long."""
        self._wanted.add(message.call)
        (self._long if message.long else self._short).put(message)

    def cancel(self, call: int) -> None:
        """Stop tokenizing a text as soon as possible. Its `TextTokens` message is sent all the same."""
        self._wanted.discard(call)

    def _answer_short(self) -> NoReturn:
        while True:
            self._answer(self._short.get())

    def _answer_long(self) -> NoReturn:
        """Start one thread for each long text, so that the memory of its large stack is released afterwards."""
        while True:
            message = self._long.get()
            threading.stack_size(stack_bytes(message.text))
            vital_thread(self._answer_slowly, message, name="tokenizer of a long text").join()

    def _answer_slowly(self, message: messages.TokenizeText) -> None:
        if sys.platform == "linux":  # only Linux has a niceness for each thread
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
