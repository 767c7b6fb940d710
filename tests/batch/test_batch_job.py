"""Batch jobs and journals: order, retries, stops and continuation give the same output."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from batch_rows import CREATED, LONGEST, answering, bare, completion, open_journal, output, run, wrapped, write

from afterword.batch import batch_job as jobs
from afterword.batch.batch_job import BatchJob, Progress
from afterword.batch.input_lines import BatchRequest, read_lines, read_row
from afterword.batch.journal import Journal
from afterword.batch.output_lines import OutputLine, ServerReply, success_line
from afterword.errors import BatchStopped, SettingError

BUSY, BROKEN, NOT_RETRIED = (
    ServerReply(503, b"{}", retry=2.0),
    ServerReply(500, b"{}", attempted=True),
    ServerReply(500, b"{}"),
)
LINES = [bare(prompt="a"), wrapped("x", prompt="b", seed=1), b"{no", b"", wrapped("x", prompt="c"), bare(prompt="aa")]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PAUSE", 0)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "in.jsonl", *LINES)


@pytest.fixture
def journal(source: Path, tmp_path: Path) -> Journal:
    return open_journal(source, tmp_path / "journal")


def uninterrupted_output(source: Path, path: Path) -> bytes:
    journal = open_journal(source, path)
    run(source, journal, answering())
    journal.write(path.with_name("uninterrupted"))
    journal.remove()
    return path.with_name("uninterrupted").read_bytes()


def test_every_line_has_one_answer_in_the_order_of_the_input(source, journal):
    progress = run(source, journal, answering())
    lines = output(journal)
    assert [line["custom_id"] for line in lines] == ["row-1", "x", None, "x", "row-6"]
    assert [line["error"] and line["error"]["code"] for line in lines] == [
        None,
        None,
        "invalid_json_line",
        "duplicate_custom_id",
        None,
    ]
    assert (progress.done.succeeded, progress.done.failed, progress.lines) == (3, 2, 5)
    assert progress.done == journal.counts()


def test_requests_are_sent_in_the_order_of_their_prompts(tmp_path):
    prompts = ["b2", "a1", "b1", "a2"]
    source = write(tmp_path / "in", *(bare(prompt=prompt) for prompt in prompts))
    sent: list[str] = []

    def note(request):
        sent.append(request["prompt"])
        return completion(request)

    run(source, open_journal(source, tmp_path / "journal"), answering(note), concurrency=1)
    assert sent == sorted(prompts)


def test_concurrency_limits_the_requests_sent_at_the_same_time(source, tmp_path):
    source = write(tmp_path / "many", *(bare(prompt=str(number)) for number in range(40)))
    five = asyncio.Barrier(5)
    now = most = 0

    async def send(*_: object) -> ServerReply:
        nonlocal now, most
        now += 1
        most = max(most, now)
        async with asyncio.timeout(30):
            await five.wait()  # all five requests are sent before one is answered, on a slow machine too
        now -= 1
        return completion({})

    run(source, open_journal(source, tmp_path / "journal"), send, concurrency=5)
    assert most == 5


@pytest.mark.parametrize("done", [set(), {1}, {2}, {6}, {1, 2}, {1, 6}, {2, 6}, {1, 2, 6}], ids=str)
def test_output_does_not_depend_on_what_an_earlier_run_answered(source, tmp_path, done):
    expected = uninterrupted_output(source, tmp_path / "first.journal")
    journal = open_journal(source, tmp_path / "second.journal")
    with source.open("rb") as file:
        rows = [row for line in read_lines(file, LONGEST) if isinstance(row := read_row(line), BatchRequest)]
    journal.add(
        [success_line(row, completion(json.loads(row.request_body)), CREATED) for row in rows if row.line in done]
    )
    journal.close()
    journal = open_journal(source, tmp_path / "second.journal")
    sent: Counter[str] = Counter()

    def note(request):
        sent[request["prompt"]] += 1
        return completion(request)

    run(source, journal, answering(note), concurrency=2)
    journal.write(tmp_path / "out")
    journal.remove()
    assert (tmp_path / "out").read_bytes() == expected
    assert set(sent.values()) <= {1}
    assert len(sent) == 3 - len(done)


@pytest.mark.parametrize("after", range(12))
def test_a_job_cancelled_at_any_request_can_be_continued(tmp_path, after):
    source = write(tmp_path / "in", *(bare(prompt=str(number)) for number in range(8)))
    expected = uninterrupted_output(source, tmp_path / "first.journal")
    journal = open_journal(source, tmp_path / "second.journal")
    sent = 0

    async def run_until_cancelled() -> None:
        async def send(_: str, __: str, body: bytes) -> ServerReply:
            nonlocal sent
            sent += 1
            if sent > after:
                task.cancel()
            await asyncio.sleep(0)
            return completion(json.loads(body))

        task = asyncio.create_task(
            BatchJob(source, journal, CREATED, LONGEST, 2).run(send, Progress(8, journal.counts()))
        )
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run_until_cancelled())
    run(source, journal, answering())
    journal.write(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected


def test_answers_before_a_stop_are_in_the_journal(tmp_path):
    source = write(tmp_path / "in", *(bare(prompt=str(number)) for number in range(8)))
    journal = open_journal(source, tmp_path / "journal")

    def choose(request):
        if request["prompt"] == "5":
            raise BatchStopped("No more.")
        return completion(request)

    with pytest.raises(BatchStopped):
        run(source, journal, answering(choose), concurrency=1)
    assert journal.counts().succeeded == 5


# ---- servers that are busy or fail


def run_with_replies(replies: list[ServerReply], tmp_path: Path) -> tuple[list[float], Progress, Journal]:
    source = write(tmp_path / "in", bare(prompt="a"))
    left = iter(replies)
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    journal = open_journal(source, tmp_path / "journal")
    progress = run(source, journal, answering(lambda _: next(left)), random_number=lambda: 0.0, sleep=sleep)
    assert next(left, None) is None
    return waits, progress, journal


def test_a_busy_server_is_retried_with_backoff_until_it_answers(tmp_path):
    waits, progress, _ = run_with_replies([BUSY] * 20 + [completion({})], tmp_path)
    assert progress.done.succeeded == 1
    assert min(waits) == 2.0
    assert max(waits) == 30.0
    assert waits == sorted(waits)


def test_an_unreachable_server_is_retried_until_it_answers(tmp_path):
    _, progress, _ = run_with_replies([ServerReply(0, b"", retry=True)] * 9 + [completion({})], tmp_path)
    assert progress.done.succeeded == 1
    assert not progress.waiting_for


def test_a_failing_server_is_tried_six_times_then_its_error_is_the_answer(tmp_path):
    waits, progress, journal = run_with_replies([BROKEN] * 6, tmp_path)
    assert len(waits) == 5
    assert progress.done.failed == 1
    assert output(journal)[0]["response"]["status_code"] == 500


def test_an_error_that_must_not_be_retried_is_the_answer_at_once(tmp_path):
    waits, progress, _ = run_with_replies([NOT_RETRIED], tmp_path)
    assert (waits, progress.done.failed) == ([], 1)


# ---- the journal


def test_a_second_process_is_refused(journal):
    with pytest.raises(SettingError, match="Another process"):
        Journal(journal.path)
    journal.close()
    Journal(journal.path).close()


def test_a_file_that_is_not_a_journal_is_refused(tmp_path):
    path = tmp_path / "journal"
    path.write_bytes(b"another file, and long enough to be read as a database" * 40)
    with pytest.raises(SettingError, match="is not a journal"):
        Journal(path)


def test_answers_are_written_in_one_transaction(journal, source):
    with source.open("rb") as file:
        row = read_row(next(read_lines(file, LONGEST)))
    assert isinstance(row, BatchRequest)
    answer = success_line(row, completion({}), CREATED)
    with pytest.raises(BatchStopped):
        journal.add([answer, answer])
    assert journal.done(1, 9) == {3, 5}  # the faulty lines


def test_a_scan_stops_at_its_limits(tmp_path):
    source = write(tmp_path / "in", *[b"{no"] * 50)
    journal = Journal(tmp_path / "a")
    journal.scan(source, LONGEST, {}, max_faults=7)
    assert journal.counts().failed == 7
    journal = Journal(tmp_path / "b")
    journal.scan(source, LONGEST, {}, max_lines=9)
    assert journal.facts["rows"] == "10"


def test_requests_are_sorted_within_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "WINDOW", 4)
    source = write(tmp_path / "in", *(bare(prompt=f"{9 - number}") for number in range(10)))
    sent: list[str] = []

    def note(request):
        sent.append(request["prompt"])
        return completion(request)

    run(source, open_journal(source, tmp_path / "journal"), answering(note), concurrency=1)
    assert sent == ["6", "7", "8", "9", "2", "3", "4", "5", "0", "1"]


# ---- answers that are too large


@pytest.mark.parametrize("size", [10_000, 100_000, 1_000_000])
def test_an_answer_too_large_for_sqlite_becomes_an_error_of_its_line(source, tmp_path, size):
    journal = open_journal(source, tmp_path / "journal")
    journal._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, size)

    def choose(request: dict[str, Any]) -> ServerReply:
        return completion(request, padding="x" * size if request["prompt"] == "b" else "")

    run(source, journal, answering(choose))
    codes = {line["custom_id"]: line["error"] and line["error"]["code"] for line in output(journal)}
    assert codes["row-1"] is codes["row-6"] is None
    errors = [line["error"] for line in output(journal) if line["custom_id"] == "x"]
    assert errors[0]["code"] == "answer_too_large"
    assert str(journal.max_answer_bytes) in errors[0]["message"]


def test_an_answer_of_the_maximum_size_can_be_stored(source, journal):
    journal._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 50_000)
    journal.add([OutputLine(99, True, b"x" * journal.max_answer_bytes)])
    assert journal.size() >= journal.max_answer_bytes


def test_the_journal_has_mode_0600_and_the_output_follows_the_umask(source, tmp_path):
    before = os.umask(0o022)
    try:
        journal = open_journal(source, tmp_path / "journal")
        journal.write(tmp_path / "out")
        journal.write(tmp_path / "private", private=True)
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("journal", "out", "private")]
    assert modes == [0o600, 0o644, 0o600]


def test_lines_of_large_replies_are_made_one_at_a_time_in_a_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_LARGE_REPLY", 1000)
    source = write(tmp_path / "in", *(bare(prompt=str(number)) for number in range(12)))
    threads: dict[bool, set[int]] = {False: set(), True: set()}
    running: list[int] = []

    def make(row, reply, created):
        is_large = len(reply.body) > 1000
        threads[is_large].add(threading.get_ident())
        if is_large:
            running.append(1)
            assert len(running) == 1
            time.sleep(0.001)
            running.pop()
        return success_line(row, reply, created)

    monkeypatch.setattr(jobs, "success_line", make)
    journal = open_journal(source, tmp_path / "journal")
    run(source, journal, answering(lambda request: completion(request, pad="x" * 1000 * (int(request["prompt"]) % 2))))
    assert [line["response"]["body"]["choices"][0]["text"]["prompt"] for line in output(journal)] == [
        *map(str, range(12))
    ]
    assert threads[False] == {threading.get_ident()}
    assert threading.get_ident() not in threads[True]


def test_answers_that_wait_for_the_journal_are_bounded_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_MAX_UNWRITTEN_BYTES", 2000)
    source = write(tmp_path / "in", *(bare(prompt=str(number)) for number in range(40)))
    journal = open_journal(source, tmp_path / "journal")
    add, sizes = journal.add, []

    def note(answers):
        sizes.append(sum(len(answer.text) for answer in answers))
        add(answers)

    monkeypatch.setattr(journal, "add", note)
    run(source, journal, answering(lambda request: completion(request, pad="x" * 900)), concurrency=20)
    assert len(output(journal)) == 40
    assert 1000 < max(sizes) < 2000 + 1500
