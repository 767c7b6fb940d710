"""Decides when a dead worker is started again. Pure: callers pass in the time."""

from __future__ import annotations

from collections import deque

_CRASHES, _WINDOW = 5, 300.0  # the worker counts as failing after this many crashes within this many seconds
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds before another attempt to start


class RestartPolicy:
    """Decides when to start a worker again.

    The first restart is immediate, because a pause helps only against a crash loop. Later pauses grow exponentially.
    """

    def __init__(self) -> None:
        self._crashes: deque[float] = deque(maxlen=16)

    def next_delay(self, now: float) -> float:
        """Record a crash or a failed start, and return the seconds to wait before the next attempt."""
        self._crashes.append(now)
        self._forget(now)
        again = len(self._crashes) - 1
        return min(_FIRST_PAUSE * 2.0 ** (again - 1), _LONGEST_PAUSE) if again else 0.0

    def record_success(self) -> None:
        """Forget all crashes: the worker has finished a job, so it can do its work in spite of occasional crashes."""
        self._crashes.clear()

    def is_failing(self, now: float) -> bool:
        """Whether the worker has crashed so often that clients should not wait for the next start."""
        self._forget(now)
        return len(self._crashes) >= _CRASHES

    def _forget(self, now: float) -> None:
        while self._crashes and now - self._crashes[0] > _WINDOW:
            self._crashes.popleft()
