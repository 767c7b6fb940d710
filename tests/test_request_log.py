"""The request log: a thread writes whole lines or none, and no request waits for the disk."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from afterword.errors import SettingError
from afterword.observability.request_log import open_request_log


def test_lines_are_appended_to_the_file(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    with open_request_log(path) as request_log:
        for number in range(100):
            request_log.write(b"%d" % number)
    assert path.read_bytes() == b"before\n" + b"".join(b"%d\n" % number for number in range(100))


def test_without_a_path_there_is_no_log():
    with open_request_log(None) as request_log:
        assert request_log is None


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(SettingError, match="--log"), open_request_log(tmp_path / "missing" / "log"):
        pass


def test_an_incomplete_line_is_ended_before_the_next(tmp_path, monkeypatch):
    write, partial = os.write, []

    def write_partly_once(file: int, data: bytes) -> int:
        if not partial:
            partial.append(data)
            return write(file, data[:3])
        return write(file, data)

    monkeypatch.setattr(os, "write", write_partly_once)
    with open_request_log(tmp_path / "log") as request_log:
        request_log.write(b"first")
        request_log.write(b"second")
    assert (tmp_path / "log").read_bytes() == b"fir\nsecond\n"


def test_an_error_is_logged_once_until_a_line_is_written(tmp_path, monkeypatch, caplog):
    write = os.write
    fails = iter([True, True, False, True, True])

    def fail_sometimes(file: int, data: bytes) -> int:
        if next(fails):
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", fail_sometimes)
    with caplog.at_level(logging.WARNING), open_request_log(tmp_path / "log") as request_log:
        for number in range(5):
            request_log.write(b"%d" % number)
    assert (tmp_path / "log").read_bytes() == b"2\n"
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1, 1]


def test_requests_do_not_wait_for_a_hanging_disk(tmp_path, monkeypatch, caplog):
    hangs, resume = threading.Event(), threading.Event()
    write = os.write

    def hanging_write(file: int, data: bytes) -> int:
        hangs.set()
        resume.wait()
        return write(file, data)

    monkeypatch.setattr("afterword.observability.request_log._MAX_QUEUED", 10)
    monkeypatch.setattr(os, "write", hanging_write)
    with caplog.at_level(logging.WARNING), open_request_log(tmp_path / "log") as request_log:
        request_log.write(b"0")
        hangs.wait()  # the thread is writing one line, and ten more fit into the queue
        for number in range(1, 100):
            request_log.write(b"%d" % number)
        resume.set()
    assert (tmp_path / "log").read_text().split() == [str(number) for number in range(11)]
    assert len(caplog.records) == 1
