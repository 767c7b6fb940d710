"""Tests of the worker's tokenizer threads: short texts overtake long ones, and cancelled texts end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from afterword.engine import messages
from afterword.engine.worker.tokenizer_threads import TokenizerThreads, stack_bytes


class SlowTokenizer:
    """Tokenizes a text in parts of one letter. A text in capitals is long; the test releases each of its parts."""

    def __init__(self) -> None:
        self.sent: queue.SimpleQueue[messages.TextTokens] = queue.SimpleQueue()
        self.begun: list[str] = []
        self.step = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.threads = TokenizerThreads(self.tokenize, self.sent.put)
        self.threads.start()

    def tokenize(self, text: str, special: bool) -> Iterator[tuple[int, ...]]:
        self.begun.append(text)
        for letter in text:
            if text.isupper():
                assert self.step.acquire(timeout=30)
            yield (ord(letter),)
            self.done.release()

    def add(self, call: int, text: str) -> None:
        self.threads.add(messages.TokenizeText(call, text, True, text.isupper()))

    def answer(self) -> messages.TextTokens:
        return self.sent.get(timeout=30)


@pytest.fixture
def slow() -> SlowTokenizer:
    return SlowTokenizer()


def test_a_short_text_overtakes_a_long_one(slow: SlowTokenizer) -> None:
    slow.add(1, "AB")
    slow.add(2, "ab")
    assert slow.answer() == messages.TextTokens.of(2, (97, 98))
    slow.step.release(2)
    assert slow.answer() == messages.TextTokens.of(1, (65, 66), True)


def test_a_cancelled_text_ends_after_the_current_part(slow: SlowTokenizer) -> None:
    slow.add(1, "ABCDEF")
    slow.step.release()
    assert slow.done.acquire(timeout=30)
    slow.threads.cancel(1)
    slow.step.release()
    assert slow.answer() == messages.TextTokens.of(1, (), True)
    slow.add(2, "G")
    slow.step.release()
    assert slow.answer() == messages.TextTokens.of(2, (71,), True)


def test_a_cancelled_text_in_the_queue_is_not_started(slow: SlowTokenizer) -> None:
    for call, text in enumerate(("A", "B", "C")):
        slow.add(call, text)
    slow.threads.cancel(1)
    slow.step.release(2)
    assert [slow.answer() for _ in range(3)] == [
        messages.TextTokens.of(0, (65,), True),
        messages.TextTokens.of(1, (), True),
        messages.TextTokens.of(2, (67,), True),
    ]
    assert slow.begun == ["A", "C"]


def test_parts_of_short_and_long_texts_are_counted_separately(slow: SlowTokenizer) -> None:
    slow.add(1, "abc")
    slow.answer()
    assert (slow.threads.parts[0] > 0, slow.threads.parts[1]) == (True, 0)
    slow.add(2, "AB")
    slow.step.release(2)
    slow.answer()
    assert slow.threads.parts[1] > 0


def test_a_longer_text_has_a_larger_stack() -> None:
    assert stack_bytes("x" * 2**20) - stack_bytes("") >= 512 * 2**20
    assert stack_bytes("x" * 12345) % 4096 == 0
