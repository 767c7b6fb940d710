"""Lines that are written by a thread: whole ones or none, and nobody waits for a disk."""

from __future__ import annotations

import logging
import os
import threading

import pytest

from afterword.errors import SettingError
from afterword.observability.request_log import open_request_log


def test_lines_are_added_to_what_is_there(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"before\n")
    with open_request_log(path) as request_log:
        for number in range(100):
            request_log.write(b"%d" % number)
    assert path.read_bytes() == b"before\n" + b"".join(b"%d\n" % number for number in range(100))


def test_without_a_path_there_are_none():
    with open_request_log(None) as request_log:
        assert request_log is None


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    with pytest.raises(SettingError, match="--log"), open_request_log(tmp_path / "missing" / "log"):
        pass


def test_a_torn_line_does_not_spoil_the_next(tmp_path, monkeypatch):
    write, torn = os.write, []

    def tears_once(file: int, data: bytes) -> int:
        if not torn:
            torn.append(data)
            return write(file, data[:3])
        return write(file, data)

    monkeypatch.setattr(os, "write", tears_once)
    with open_request_log(tmp_path / "log") as request_log:
        request_log.write(b"first")
        request_log.write(b"second")
    assert (tmp_path / "log").read_bytes() == b"fir\nsecond\n"


def test_trouble_is_told_once_until_it_is_over(tmp_path, monkeypatch, caplog):
    write = os.write
    fails = iter([True, True, False, True, True])

    def fails_at_times(file: int, data: bytes) -> int:
        if next(fails):
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", fails_at_times)
    with caplog.at_level(logging.WARNING), open_request_log(tmp_path / "log") as request_log:
        for number in range(5):
            request_log.write(b"%d" % number)
    assert (tmp_path / "log").read_bytes() == b"2\n"
    assert [record.getMessage().count("No space left") for record in caplog.records] == [1, 1]


def test_nobody_waits_for_a_disk_that_hangs(tmp_path, monkeypatch, caplog):
    hangs, goes_on = threading.Event(), threading.Event()
    write = os.write

    def hung(file: int, data: bytes) -> int:
        hangs.set()
        goes_on.wait()
        return write(file, data)

    monkeypatch.setattr("afterword.observability.request_log._MAX_QUEUED", 10)
    monkeypatch.setattr(os, "write", hung)
    with caplog.at_level(logging.WARNING), open_request_log(tmp_path / "log") as request_log:
        request_log.write(b"0")
        hangs.wait()  # one line is in the writer's hands, and ten may wait
        for number in range(1, 100):
            request_log.write(b"%d" % number)
        goes_on.set()
    assert (tmp_path / "log").read_text().split() == [str(number) for number in range(11)]
    assert len(caplog.records) == 1
