"""The batch manager: final states, order by key, restarts, failing disks, storage limits."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from batch_rows import CREATED, answering, bare, completion, wrapped

from afterword.batch import batch_job as jobs
from afterword.batch import manager as managers
from afterword.batch.batch_limits import BatchLimits
from afterword.batch.file_store import FileStore
from afterword.batch.manager import BatchManager
from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.batch.stored_items import FINAL_STATUSES, StoredBatch, StoredFile
from afterword.errors import RequestError

ROWS = (wrapped("a", prompt="one"), wrapped("b", prompt="bad"), wrapped("c", prompt="two"))
Scenario = Callable[[BatchManager], Coroutine[Any, Any, Any]]


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PAUSE", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "batches"


def choose(request: dict[str, Any]) -> ServerReply:
    return ServerReply(400, b'{"error":{}}') if request["prompt"] == "bad" else completion(request)


def with_manager(folder: Path, send: SendRequest, scenario: Scenario, **options: Any) -> Any:
    """Run a scenario with a running manager. `send` is the client of every key unless `client_for` is given."""
    client_for = options.get("client_for", lambda _: send)
    limits, clock = options.get("limits", BatchLimits()), options.get("clock", lambda: CREATED)

    async def main() -> Any:
        manager = BatchManager(FileStore(folder), limits, clock)
        async with asyncio.timeout(30), manager.running(client_for):
            return await scenario(manager)

    return asyncio.run(main())


def add_batch(
    manager: BatchManager, *rows: bytes, key: str = "k", name: str = "b1", expires: int = CREATED + 9
) -> None:
    path = manager.file_store.upload(f"f-{name}")
    path.write_bytes(b"\n".join(rows))
    manager.file_store.add(StoredFile(path.name, key, "in", "batch", path.stat().st_size, CREATED), 10**6)
    manager.file_store.add_batch(StoredBatch(name, key, "/v1/completions", "24h", path.name, CREATED, expires), 9)
    manager.notify()


async def wait_for_end(manager: BatchManager, key: str = "k", name: str = "b1") -> StoredBatch:
    while (batch := manager.file_store.batch(key, name)).status not in FINAL_STATUSES:
        await asyncio.sleep(0.001)
    return batch


def lines(manager: BatchManager, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    return [json.loads(line) for line in manager.file_store.contents(file).read_bytes().splitlines()]


def test_answers_and_errors_are_in_separate_files(folder):
    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *ROWS)
        batch = await wait_for_end(manager)
        assert (batch.status, batch.lines, batch.succeeded, batch.failed) == ("completed", 3, 2, 1)
        assert list(batch.times) == ["in_progress", "finalizing", "completed"]
        assert [line["custom_id"] for line in lines(manager, batch.output_file)] == ["a", "c"]
        assert [line["custom_id"] for line in lines(manager, batch.error_file)] == ["b"]
        assert manager.file_store.file("k", batch.output_file or "").purpose == "batch_output"

    with_manager(folder, answering(choose), scenario)
    assert not list((folder / "journals").iterdir())


@pytest.mark.parametrize(
    ("rows", "errors"),
    [
        ((wrapped("a", prompt="b"), b"{no", wrapped("a")), [("invalid_json_line", 2), ("duplicate_custom_id", 3)]),
        ((b"", b" "), [("empty_file", None)]),
        ([bare(prompt="a")] * 5, [("too_many_rows", None)]),
        ([bare(prompt="a", stream=True)], [("stream_not_supported", 1)]),
    ],
)
def test_a_file_with_faulty_lines_fails_and_names_the_lines(folder, rows, errors):
    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *rows)
        batch = await wait_for_end(manager)
        assert batch.status == "failed"
        assert [(each.code, each.line) for each in batch.errors] == errors
        assert (batch.output_file, batch.error_file) == (None, None)

    def never(_: object) -> ServerReply:
        raise AssertionError

    with_manager(folder, answering(never), scenario, limits=BatchLimits(max_rows=4))


def test_a_cancelled_batch_keeps_what_was_answered(folder):
    first = asyncio.Event()

    async def send(_: str, __: str, body: bytes) -> ServerReply:
        if first.is_set():
            await asyncio.Event().wait()
        first.set()
        return completion(json.loads(body))

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *(bare(prompt=str(number)) for number in range(40)))
        while not (batch := manager.with_progress(manager.file_store.batch("k", "b1"))).succeeded:
            await asyncio.sleep(0.001)
        assert (await manager.cancel("k", "b1")).status == "cancelling"
        batch = await wait_for_end(manager)
        assert (batch.status, batch.succeeded, batch.failed, batch.lines) == ("cancelled", 1, 0, 40)
        assert len(lines(manager, batch.output_file)) == 1
        assert (await manager.cancel("k", "b1")).status == "cancelled"  # a second call changes nothing

    with_manager(folder, send, scenario)


def test_only_the_key_of_a_batch_can_cancel_it(folder):
    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *ROWS)
        with pytest.raises(RequestError):
            await manager.cancel("other", "b1")

    with_manager(folder, answering(choose), scenario)


def test_unanswered_requests_expire(folder):
    async def send(_: str, __: str, body: bytes) -> ServerReply:
        if json.loads(body)["prompt"] != "one":
            await asyncio.Event().wait()
        return completion({})

    now = [float(CREATED)]

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *ROWS, expires=CREATED + 1)
        batch = await wait_for_end(manager)
        assert (batch.status, batch.succeeded, batch.failed) == ("expired", 1, 2)
        assert [line["error"]["code"] for line in lines(manager, batch.error_file)] == ["batch_expired"] * 2

    with_manager(folder, send, scenario, clock=lambda: now[0])


def test_a_restarted_server_continues_its_batches(folder):
    sent: list[str] = []

    def hold(many: int) -> SendRequest:
        async def send(_: str, __: str, body: bytes) -> ServerReply:
            if len(sent) >= many:
                await asyncio.Event().wait()
            sent.append(json.loads(body)["prompt"])
            return completion(json.loads(body))

        return send

    async def interrupted(manager: BatchManager) -> None:
        add_batch(manager, *(bare(prompt=str(number)) for number in range(60)))
        while manager.with_progress(manager.file_store.batch("k", "b1")).succeeded < 20:
            await asyncio.sleep(0.001)

    async def scenario(manager: BatchManager) -> None:
        batch = await wait_for_end(manager)
        assert (batch.status, batch.succeeded) == ("completed", 60)
        assert [line["custom_id"] for line in lines(manager, batch.output_file)] == [f"row-{n}" for n in range(1, 61)]

    with_manager(folder, hold(20), interrupted)
    with_manager(folder, hold(1000), scenario)
    assert sorted(sent, key=int) == [str(number) for number in range(60)]


@pytest.mark.parametrize("status", ["finalizing", "cancelling"])
def test_a_server_killed_while_it_ends_a_batch_writes_the_output_again(folder, status):
    async def killed(manager: BatchManager) -> None:
        add_batch(manager, *ROWS)
        put = manager.file_store.save_batch
        reached = asyncio.Event()

        def note(batch: StoredBatch, files: Any = ()) -> StoredBatch:
            if batch.status in FINAL_STATUSES:
                reached.set()
                raise RuntimeError("killed here")
            return put(batch, files)

        manager.file_store.save_batch = note  # type: ignore[method-assign]
        await reached.wait()
        if status == "cancelling":
            put(manager.file_store.batch("k", "b1").with_status("cancelling", CREATED))

    async def scenario(manager: BatchManager) -> None:
        batch = await wait_for_end(manager)
        assert batch.status == ("cancelled" if status == "cancelling" else "completed")
        assert [line["custom_id"] for line in lines(manager, batch.output_file)] == ["a", "c"]

    with_manager(folder, answering(choose), killed)
    with_manager(folder, answering(choose), scenario)


def test_each_key_runs_one_batch_at_a_time_independently_of_other_keys(folder):
    going = asyncio.Event()
    sent: list[str] = []

    def client_for(key: str) -> SendRequest:
        async def send(_: str, __: str, body: bytes) -> ServerReply:
            sent.append(f"{key} {json.loads(body)['prompt']}")
            if key == "k":
                await going.wait()
            return completion({})

        return send

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, bare(prompt="1"))
        add_batch(manager, bare(prompt="2"), name="b2")
        add_batch(manager, bare(prompt="3"), name="b3", key="other")
        assert (await wait_for_end(manager, "other", "b3")).status == "completed"
        while len(sent) < 2:
            await asyncio.sleep(0.001)
        assert sorted(sent) == ["k 1", "other 3"]
        going.set()
        await wait_for_end(manager, "k", "b2")
        assert sent[2:] == ["k 2"]

    with_manager(folder, answering(), scenario, client_for=client_for)


def test_a_batch_waits_while_the_disk_fails(folder, monkeypatch):
    monkeypatch.setattr(managers, "_PAUSE", 0.01)
    left = [3]
    write = managers.Journal.write

    def failing(self: Any, *arguments: Any, **options: Any) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise managers.StorageFailed("The disk is full.")
        return write(self, *arguments, **options)

    monkeypatch.setattr(managers.Journal, "write", failing)

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *ROWS)
        batch = await wait_for_end(manager)
        assert (batch.status, batch.succeeded, batch.failed) == ("completed", 2, 1)

    with_manager(folder, answering(choose), scenario)
    assert left[0] < 0


def test_a_deleted_input_file_fails_its_batch(folder):
    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *ROWS)
        manager.file_store.contents("f-b1").unlink()
        batch = await wait_for_end(manager)
        assert (batch.status, [each.code for each in batch.errors]) == ("failed", ["input_file_unreadable"])

    with_manager(folder, answering(choose), scenario)


def test_a_batch_that_expires_after_its_input_file_was_deleted_fails(folder):
    now, input_file = [float(CREATED)], []

    async def send(*_: object) -> ServerReply:
        input_file[0].unlink(missing_ok=True)
        now[0] += 2
        await asyncio.Event().wait()
        return completion({})

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *ROWS, expires=CREATED + 1)
        input_file.append(manager.file_store.contents("f-b1"))
        batch = await wait_for_end(manager)
        assert (batch.status, [each.code for each in batch.errors]) == ("failed", ["input_file_unreadable"])

    with_manager(folder, send, scenario, clock=lambda: now[0])


def test_a_folder_locked_by_another_server_is_logged_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(managers, "_PAUSE", 0.01)

    async def first(manager: BatchManager) -> None:
        add_batch(manager, *ROWS)
        manager.file_store.unfinished_batches()
        other = BatchManager(FileStore(folder), BatchLimits())
        tries: list[None] = []
        look = other.file_store.unfinished_batches

        def note() -> list[StoredBatch]:
            tries.append(None)
            return look()

        monkeypatch.setattr(other.file_store, "unfinished_batches", note)
        async with other.running(lambda _: answering(choose)):
            while len(tries) < 3:
                await asyncio.sleep(0.01)

    async def hold(_: str, __: str, ___: bytes) -> ServerReply:
        await asyncio.Event().wait()
        raise AssertionError

    with_manager(folder, hold, first)
    assert len([record for record in caplog.records if "--batch-dir" in record.message]) == 1


# ---- storage limits


def test_answers_over_the_storage_limit_become_errors_of_their_lines(folder):
    """Answers up to the limit are stored. Later ones become errors, and the remaining requests are not sent."""
    sent: list[str] = []

    def choose(request: dict[str, Any]) -> ServerReply:
        sent.append(request["prompt"])
        return completion(request, padding="x" * 1000)

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *(bare(prompt=str(number)) for number in range(200)))
        batch = await wait_for_end(manager)
        assert (batch.status, batch.lines, batch.succeeded + batch.failed) == ("completed", 200, 200)
        succeeded, failed = lines(manager, batch.output_file), lines(manager, batch.error_file)
        assert 5 <= len(succeeded) <= 20
        assert {line["error"]["code"] for line in failed} == {"storage_limit_reached"}
        assert len(sent) < 100
        output = manager.file_store.file("k", batch.output_file or "")
        assert output.size + manager.file_store.file("k", "f-b1").size <= 25_000
        sizes = sum(file.size for file in manager.file_store.files("k", None, 9, "asc", None)[0])
        while manager.file_store.quota.used("k") != sizes:
            await asyncio.sleep(0.001)

    with_manager(folder, answering(choose), scenario, limits=BatchLimits(max_stored=25_000))


def test_answers_of_a_running_batch_count_against_uploads(folder):
    waiting, first = asyncio.Event(), asyncio.Event()

    async def send(_: str, __: str, body: bytes) -> ServerReply:
        if first.is_set():
            await waiting.wait()
        first.set()
        return completion(json.loads(body), padding="x" * 5000)

    async def scenario(manager: BatchManager) -> None:
        add_batch(manager, *(bare(prompt=str(number)) for number in range(3)))
        while not manager.file_store.quota.used("k") > 5000:
            await asyncio.sleep(0.001)
        assert not manager.file_store.quota.reserve("k", 5000, 10_000)
        assert manager.file_store.quota.reserve("other", 5000, 10_000)
        waiting.set()
        await wait_for_end(manager)

    with_manager(folder, send, scenario, limits=BatchLimits(max_stored=10_000))


def test_answers_of_a_continued_batch_count_against_the_limit(folder):
    async def never(_: str, __: str, body: bytes) -> ServerReply:
        if json.loads(body)["prompt"] != "0":
            await asyncio.Event().wait()
        return completion(json.loads(body), padding="x" * 5000)

    async def interrupted(manager: BatchManager) -> None:
        add_batch(manager, *(bare(prompt=str(number)) for number in range(3)))
        while not manager.with_progress(manager.file_store.batch("k", "b1")).succeeded:
            await asyncio.sleep(0.001)

    async def scenario(manager: BatchManager) -> None:
        while manager.file_store.quota.used("k") < 5000:
            await asyncio.sleep(0.001)

    with_manager(folder, never, interrupted)
    with_manager(folder, never, scenario)


def test_a_batch_waits_if_its_failure_cannot_be_written(folder, monkeypatch):
    """Writing the status `failed` fails too: the manager waits before each attempt and does not loop without pause."""
    monkeypatch.setattr(managers, "_PAUSE", 0.01)
    waits: list[str] = []

    async def scenario(manager: BatchManager) -> None:
        put, wait = manager._save, manager._wait

        async def failing(batch: StoredBatch) -> StoredBatch:
            if len(waits) < 3:
                raise managers.StorageFailed("The disk is full.")
            return await put(batch)

        async def noted(reason: str) -> None:
            waits.append(reason)
            await wait(reason)

        monkeypatch.setattr(manager, "_save", failing)
        monkeypatch.setattr(manager, "_wait", noted)
        add_batch(manager, *ROWS)
        manager.file_store.contents("f-b1").unlink()
        assert (await wait_for_end(manager)).status == "failed"

    with_manager(folder, answering(choose), scenario)
    assert waits == ["The disk is full."] * 3


def test_expired_files_are_deleted_while_batches_run(folder, monkeypatch):
    monkeypatch.setattr(managers, "_EXPIRY_INTERVAL", 0.001)

    async def scenario(manager: BatchManager) -> None:
        path = manager.file_store.upload("f1")
        path.write_bytes(b"{}")
        manager.file_store.add(StoredFile("f1", "k", "in", "batch", 2, 0, expires=1), 10**6)
        while path.exists():
            await asyncio.sleep(0.001)

    with_manager(folder, answering(choose), scenario)
