"""The engine's two tokenizing threads: short texts pass long ones, and abandoned texts end."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from afterword.engine import messages
from afterword.engine.worker.tokenizer_threads import TokenizerThreads, stack_bytes


class Slow:
    """Tokenizes a text in parts, a letter each. A part of a long text is done when the test says so."""

    def __init__(self) -> None:
        self.said: queue.SimpleQueue[messages.TextTokens] = queue.SimpleQueue()
        self.begun: list[str] = []
        self.step = threading.Semaphore(0)
        self.done = threading.Semaphore(0)
        self.work = TokenizerThreads(self.tokenize, self.said.put)
        self.work.start()

    def tokenize(self, text: str, special: bool) -> Iterator[tuple[int, ...]]:
        self.begun.append(text)
        for letter in text:
            if text.isupper():
                assert self.step.acquire(timeout=30)
            yield (ord(letter),)
            self.done.release()

    def add(self, call: int, text: str) -> None:
        self.work.add(messages.TokenizeText(call, text, True, text.isupper()))

    def answer(self) -> messages.TextTokens:
        return self.said.get(timeout=30)


@pytest.fixture
def slow() -> Slow:
    return Slow()


def test_a_short_text_passes_a_long_one(slow: Slow) -> None:
    slow.add(1, "AB")
    slow.add(2, "ab")
    assert slow.answer() == messages.TextTokens.of(2, (97, 98))
    slow.step.release(2)
    assert slow.answer() == messages.TextTokens.of(1, (65, 66), True)


def test_an_abandoned_text_ends_after_the_part_at_work(slow: Slow) -> None:
    slow.add(1, "ABCDEF")
    slow.step.release()
    assert slow.done.acquire(timeout=30)
    slow.work.cancel(1)
    slow.step.release()
    assert slow.answer() == messages.TextTokens.of(1, (), True)
    slow.add(2, "G")
    slow.step.release()
    assert slow.answer() == messages.TextTokens.of(2, (71,), True)


def test_an_abandoned_text_that_waits_is_not_begun(slow: Slow) -> None:
    for call, text in enumerate(("A", "B", "C")):
        slow.add(call, text)
    slow.work.cancel(1)
    slow.step.release(2)
    assert [slow.answer() for _ in range(3)] == [
        messages.TextTokens.of(0, (65,), True),
        messages.TextTokens.of(1, (), True),
        messages.TextTokens.of(2, (67,), True),
    ]
    assert slow.begun == ["A", "C"]


def test_parts_of_short_and_of_long_texts_are_counted_apart(slow: Slow) -> None:
    slow.add(1, "abc")
    slow.answer()
    assert (slow.work.parts[0] > 0, slow.work.parts[1]) == (True, 0)
    slow.add(2, "AB")
    slow.step.release(2)
    slow.answer()
    assert slow.work.parts[1] > 0


def test_a_longer_text_has_a_larger_stack() -> None:
    assert stack_bytes("x" * 2**20) - stack_bytes("") >= 512 * 2**20
    assert stack_bytes("x" * 12345) % 4096 == 0
