"""Appends lines to a file from a thread of its own, so that requests never wait for a disk or a pipe.

A line that cannot be written is lost. The writer thread owns the file; the event loop only puts lines into a bounded
queue. The module does not know what the lines contain.
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

_MAX_QUEUED = 10_000  # lines; further ones are lost, so that a hanging disk costs bounded memory

_log = logging.getLogger(__name__)


class RequestLog:
    """A file open for appending. The path `-` means the standard error stream."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = sys.stderr.fileno() if str(path) == "-" else _open(path)
        self._queue: queue.Queue[bytes | None] = queue.Queue(_MAX_QUEUED)
        self._has_partial_line = False
        self._error_logged = False
        self._writer = threading.Thread(target=self._write_all, name="log", daemon=True)
        self._writer.start()

    def write(self, line: bytes) -> None:
        """Queue a line, without its line end, to be written soon."""
        try:
            self._queue.put_nowait(line + b"\n")
        except queue.Full:
            self._log_error("they are written too slowly")

    def close(self) -> None:
        """Write the queued lines, for at most 4 seconds."""
        try:
            self._queue.put(None, timeout=2)
        except queue.Full:
            return
        self._writer.join(timeout=2)

    def _write_all(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                self._write(line)
            except Exception as error:  # after any error the next lines must still be written
                self._log_error(error.strerror if isinstance(error, OSError) else repr(error))
            else:
                self._error_logged = False

    def _write(self, line: bytes) -> None:
        """Write a line in one system call, so that lines of several processes do not mix.

        An incomplete line is ended before the next one.
        """
        if self._has_partial_line:
            line = b"\n" + line
        written = os.write(self._file, line)
        self._has_partial_line = written < len(line)
        if self._has_partial_line:
            raise OSError(None, "only a part of a line could be written")

    def _log_error(self, why: str | None) -> None:
        """Log that lines are lost. It logs once until a line is written again."""
        if not self._error_logged:
            _log.warning("Lines of the request log %s are lost: %s. Requests are served nevertheless.", self._path, why)
        self._error_logged = True


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    except OSError as error:
        raise SettingError(f"--log {path}: the file cannot be written ({error.strerror}).") from None


@contextmanager
def open_request_log(path: Path | None) -> Iterator[RequestLog | None]:
    """Open a request log and close it at the end; None without a path. Raises `SettingError`."""
    if path is None:
        yield None
        return
    request_log = RequestLog(path)
    try:
        yield request_log
    finally:
        request_log.close()
