"""A thread that does tasks in order, and that is replaced if a task takes too long.

A thread cannot be ended from outside. One that is stuck in a task is left to itself: it ends after that task, and a new
thread does the tasks behind it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

_STACK_BYTES = 256 * 2**20
"""llguidance calls itself for each rule of a chain of rules. Memory is taken only for the part that is used."""


class Task(Generic[T]):
    """A function call that a `TaskThread` makes. `failure`: the exception that it raised."""

    __slots__ = ("began", "done", "failure", "result", "work")

    def __init__(self, work: Callable[[], T]) -> None:
        self.work = work
        self.began: float | None = None
        self.done = threading.Event()
        self.result: T | None = None
        self.failure: Exception | None = None

    def run(self) -> None:
        """Make the call. Called once, by the thread."""
        self.began = time.monotonic()
        try:
            self.result = self.work()
        except Exception as problem:
            self.failure = problem


class TaskThread:
    """One thread at a time, started when the first task arrives. One other thread calls all methods.

    `finished` is called in the thread after each task.
    """

    def __init__(self, name: str, finished: Callable[[], None] = lambda: None) -> None:
        self._name = name
        self._finished = finished
        self._changed = threading.Condition()
        self._tasks: deque[Task[object]] = deque()
        self._running: Task[object] | None = None
        self._thread: threading.Thread | None = None
        self._stuck: list[threading.Thread] = []

    def submit(self, work: Callable[[], T]) -> Task[T]:
        """Queue a call behind the earlier ones."""
        task = Task(work)
        with self._changed:
            self._tasks.append(task)  # type: ignore[arg-type]
            self._changed.notify()
        if self._thread is None:
            self._start()
        return task

    @property
    def stuck(self) -> int:
        """The number of threads that were left to themselves and have not ended yet."""
        self._stuck = [thread for thread in self._stuck if thread.is_alive()]
        return len(self._stuck)

    def give_up(self, seconds: float) -> None:
        """Let the running task fail with `TimeoutError` if it has been running for so long."""
        with self._changed:
            task, now = self._running, time.monotonic()
            if task is None or task.began is None or now - task.began < seconds or self._thread is None:
                return
            self._running = None
            self._stuck.append(self._thread)
            self._start()
            task.failure = TimeoutError()
            task.done.set()

    def close(self) -> None:
        """Wait for the running task and end the thread. The tasks behind it are not done; nothing is called afterwards.

        Needed where Python itself ends: it would end the thread inside llguidance, which then accesses invalid memory.
        """
        with self._changed:
            thread, self._thread = self._thread, None
            self._tasks.clear()
            self._changed.notify()
        if thread is not None:
            thread.join()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=self._name, daemon=True)
        before = threading.stack_size(_STACK_BYTES)
        try:
            self._thread.start()
        finally:
            threading.stack_size(before)

    def _work(self) -> None:
        own = threading.current_thread()
        while True:
            with self._changed:
                while self._thread is own and not self._tasks:
                    self._changed.wait()
                if self._thread is not own:
                    return
                self._running = task = self._tasks.popleft()
            task.run()
            with self._changed:
                if self._running is not task:
                    return  # given up meanwhile
                self._running = None
                task.done.set()
            self._finished()
