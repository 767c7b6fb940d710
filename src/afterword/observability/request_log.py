"""Lines to a file, written by a thread: nobody waits for a disk or a reader. A line that cannot be written is lost.

Knows nothing of what the lines say.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from afterword.errors import SettingError

_MOST_WAITING = 10_000  # lines; more are lost, so a stuck disk costs bounded memory

_log = logging.getLogger(__name__)


class RequestLog:
    """An open file that lines are added to. `-` is the standard error stream."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = sys.stderr.fileno() if str(path) == "-" else _open(path)
        self._waiting: queue.Queue[bytes | None] = queue.Queue(_MOST_WAITING)
        self._has_partial_line = False
        self._complained = False
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._writer.start()

    def write(self, line: bytes) -> None:
        """Have a line written soon."""
        try:
            self._waiting.put_nowait(line + b"\n")
        except queue.Full:
            self._log_error("it is too slow")

    def close(self) -> None:
        """Write what waits, for at most a few seconds."""
        try:
            self._waiting.put(None, timeout=2)
        except queue.Full:
            return
        self._writer.join(timeout=2)

    def _write_all(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                self._write(line)
            except Exception as error:  # whatever it is, the next lines are still to be written
                self._log_error(error.strerror if isinstance(error, OSError) else repr(error))
            else:
                self._complained = False

    def _write(self, line: bytes) -> None:
        """One write a line, so that lines of several processes do not mix. A torn line is ended before the next."""
        if self._has_partial_line:
            line = b"\n" + line
        written = os.write(self._file, line)
        self._has_partial_line = written < len(line)
        if self._has_partial_line:
            raise OSError(None, "there is no room for a whole line")

    def _log_error(self, why: str | None) -> None:
        """Say that lines are lost, once until one is written again."""
        if not self._complained:
            _log.warning("Lines of the log %s are lost: %s. Requests are served all the same.", self._path, why)
        self._complained = True


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingError(f"--log {path}: it cannot be written ({error.strerror}).") from None


@contextmanager
def open_request_log(path: Path | None) -> Iterator[RequestLog | None]:
    """A file for lines if one is named, closed in the end."""
    if path is None:
        yield None
        return
    request_log = RequestLog(path)
    try:
        yield request_log
    finally:
        request_log.close()
