"""Batches in the background: they end as they should, in turn by key, also across a restart."""

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
from afterword.batch.file_store import FINAL_STATUSES, FileStore, StoredBatch, StoredFile
from afterword.batch.manager import BatchManager
from afterword.batch.output_lines import SendRequest, ServerReply
from afterword.errors import RequestError

ROWS = (wrapped("a", prompt="one"), wrapped("b", prompt="bad"), wrapped("c", prompt="two"))
Life = Callable[[BatchManager], Coroutine[Any, Any, Any]]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PAUSE", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "batches"


def choose(request: dict[str, Any]) -> ServerReply:
    return ServerReply(400, b'{"error":{}}') if request["prompt"] == "bad" else completion(request)


def living(folder: Path, ask: SendRequest | Callable[[str], SendRequest], life: Life, **how: Any) -> Any:
    """A server's batches, for as long as something lasts."""
    ask_for = how.pop("ask_for", lambda _: ask)

    async def main() -> Any:
        manager = BatchManager(FileStore(folder), how.pop("limits", BatchLimits()), how.pop("clock", lambda: CREATED))
        async with asyncio.timeout(30), manager.running(ask_for):
            return await life(manager)

    return asyncio.run(main())


def begin(manager: BatchManager, *rows: bytes, key: str = "k", name: str = "b1", expires: int = CREATED + 9) -> None:
    place = manager.file_store.upload(f"f-{name}")
    place.write_bytes(b"\n".join(rows))
    manager.file_store.add(StoredFile(place.name, key, "in", "batch", place.stat().st_size, CREATED), 10**6)
    manager.file_store.add_batch(StoredBatch(name, key, "/v1/completions", "24h", place.name, CREATED, expires), 9)
    manager.notify()


async def ended(manager: BatchManager, key: str = "k", name: str = "b1") -> StoredBatch:
    while (batch := manager.file_store.batch(key, name)).status not in FINAL_STATUSES:
        await asyncio.sleep(0.001)
    return batch


def lines(manager: BatchManager, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    return [json.loads(line) for line in manager.file_store.contents(file).read_bytes().splitlines()]


def test_answers_and_errors_come_in_files_of_their_own(folder):
    async def life(manager: BatchManager) -> None:
        begin(manager, *ROWS)
        batch = await ended(manager)
        assert (batch.status, batch.rows, batch.good, batch.bad) == ("completed", 3, 2, 1)
        assert list(batch.times) == ["in_progress", "finalizing", "completed"]
        assert [line["custom_id"] for line in lines(manager, batch.output)] == ["a", "c"]
        assert [line["custom_id"] for line in lines(manager, batch.errors)] == ["b"]
        assert manager.file_store.file("k", batch.output or "").purpose == "batch_output"

    living(folder, answering(choose), life)
    assert not list((folder / "journals").iterdir())


@pytest.mark.parametrize(
    ("rows", "wrong"),
    [
        ((wrapped("a", prompt="b"), b"{no", wrapped("a")), [("invalid_json_line", 2), ("duplicate_custom_id", 3)]),
        ((b"", b" "), [("empty_file", None)]),
        ([bare(prompt="a")] * 5, [("too_many_rows", None)]),
        ([bare(prompt="a", stream=True)], [("stream_not_supported", 1)]),
    ],
)
def test_a_wrong_file_fails_as_a_whole_and_says_in_which_lines(folder, rows, wrong):
    async def life(manager: BatchManager) -> None:
        begin(manager, *rows)
        batch = await ended(manager)
        assert batch.status == "failed"
        assert [(each.code, each.line) for each in batch.wrong] == wrong
        assert (batch.output, batch.errors) == (None, None)

    def never(_: object) -> ServerReply:
        raise AssertionError

    living(folder, answering(never), life, limits=BatchLimits(max_rows=4))


def test_a_cancelled_batch_keeps_what_was_answered(folder):
    first = asyncio.Event()

    async def ask(_: str, __: str, body: bytes) -> ServerReply:
        if first.is_set():
            await asyncio.Event().wait()
        first.set()
        return completion(json.loads(body))

    async def life(manager: BatchManager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(40)))
        while not (batch := manager.with_progress(manager.file_store.batch("k", "b1"))).good:
            await asyncio.sleep(0.001)
        assert (await manager.cancel("k", "b1")).status == "cancelling"
        batch = await ended(manager)
        assert (batch.status, batch.good, batch.bad, batch.rows) == ("cancelled", 1, 0, 40)
        assert len(lines(manager, batch.output)) == 1
        assert (await manager.cancel("k", "b1")).status == "cancelled"  # once more changes nothing

    living(folder, ask, life)


def test_only_its_key_can_cancel_it(folder):
    async def life(manager: BatchManager) -> None:
        begin(manager, *ROWS)
        with pytest.raises(RequestError):
            await manager.cancel("other", "b1")

    living(folder, answering(choose), life)


def test_what_is_not_answered_in_time_is_given_up(folder):
    async def ask(_: str, __: str, body: bytes) -> ServerReply:
        if json.loads(body)["prompt"] != "one":
            await asyncio.Event().wait()
        return completion({})

    now = [float(CREATED)]

    async def life(manager: BatchManager) -> None:
        begin(manager, *ROWS, expires=CREATED + 1)
        batch = await ended(manager)
        assert (batch.status, batch.good, batch.bad) == ("expired", 1, 2)
        assert [line["error"]["code"] for line in lines(manager, batch.errors)] == ["batch_expired"] * 2

    living(folder, ask, life, clock=lambda: now[0])


def test_a_restarted_server_goes_on(folder):
    asked: list[str] = []

    def hold(many: int) -> SendRequest:
        async def ask(_: str, __: str, body: bytes) -> ServerReply:
            if len(asked) >= many:
                await asyncio.Event().wait()
            asked.append(json.loads(body)["prompt"])
            return completion(json.loads(body))

        return ask

    async def interrupted(manager: BatchManager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(60)))
        while manager.with_progress(manager.file_store.batch("k", "b1")).good < 20:
            await asyncio.sleep(0.001)

    async def life(manager: BatchManager) -> None:
        batch = await ended(manager)
        assert (batch.status, batch.good) == ("completed", 60)
        assert [line["custom_id"] for line in lines(manager, batch.output)] == [f"row-{n}" for n in range(1, 61)]

    living(folder, hold(20), interrupted)
    living(folder, hold(1000), life)
    assert sorted(asked, key=int) == [str(number) for number in range(60)]


@pytest.mark.parametrize("status", ["finalizing", "cancelling"])
def test_a_server_that_was_killed_at_the_end_writes_it_again(folder, status):
    async def killed(manager: BatchManager) -> None:
        begin(manager, *ROWS)
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

    async def life(manager: BatchManager) -> None:
        batch = await ended(manager)
        assert batch.status == ("cancelled" if status == "cancelling" else "completed")
        assert [line["custom_id"] for line in lines(manager, batch.output)] == ["a", "c"]

    living(folder, answering(choose), killed)
    living(folder, answering(choose), life)


def test_keys_do_not_wait_for_each_others_batches_and_have_one_at_a_time(folder):
    going = asyncio.Event()
    asked: list[str] = []

    def ask_for(key: str) -> SendRequest:
        async def ask(_: str, __: str, body: bytes) -> ServerReply:
            asked.append(f"{key} {json.loads(body)['prompt']}")
            if key == "k":
                await going.wait()
            return completion({})

        return ask

    async def life(manager: BatchManager) -> None:
        begin(manager, bare(prompt="1"))
        begin(manager, bare(prompt="2"), name="b2")
        begin(manager, bare(prompt="3"), name="b3", key="other")
        assert (await ended(manager, "other", "b3")).status == "completed"
        while len(asked) < 2:
            await asyncio.sleep(0.001)
        assert sorted(asked) == ["k 1", "other 3"]
        going.set()
        await ended(manager, "k", "b2")
        assert asked[2:] == ["k 2"]

    living(folder, answering(), life, ask_for=ask_for)


def test_a_disk_that_fails_is_waited_for(folder, monkeypatch):
    monkeypatch.setattr(managers, "_PAUSE", 0.01)
    left = [3]
    write = managers.Journal.write

    def failing(self: Any, *arguments: Any, **options: Any) -> int:
        left[0] -= 1
        if left[0] >= 0:
            raise managers.StorageFailed("The disk is full.")
        return write(self, *arguments, **options)

    monkeypatch.setattr(managers.Journal, "write", failing)

    async def life(manager: BatchManager) -> None:
        begin(manager, *ROWS)
        batch = await ended(manager)
        assert (batch.status, batch.good, batch.bad) == ("completed", 2, 1)

    living(folder, answering(choose), life)
    assert left[0] < 0


def test_a_file_that_somebody_has_taken_away_fails_its_batch(folder):
    async def life(manager: BatchManager) -> None:
        begin(manager, *ROWS)
        manager.file_store.contents("f-b1").unlink()
        batch = await ended(manager)
        assert (batch.status, [each.code for each in batch.wrong]) == ("failed", ["input_file_unreadable"])

    living(folder, answering(choose), life)


def test_another_servers_folder_is_waited_for_and_told_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(managers, "_PAUSE", 0.01)

    async def first(manager: BatchManager) -> None:
        begin(manager, *ROWS)
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

    living(folder, hold, first)
    assert len([record for record in caplog.records if "--batch-dir" in record.message]) == 1


# ---- room


def test_answers_for_which_there_is_no_room_are_errors_of_their_rows(folder):
    """What fits is kept; what was answered beside it is said to have no room, and nothing more is asked."""
    asked: list[str] = []

    def choose(request: dict[str, Any]) -> ServerReply:
        asked.append(request["prompt"])
        return completion(request, padding="x" * 1000)

    async def life(manager: BatchManager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(200)))
        batch = await ended(manager)
        assert (batch.status, batch.rows, batch.good + batch.bad) == ("completed", 200, 200)
        good, bad = lines(manager, batch.output), lines(manager, batch.errors)
        assert 5 <= len(good) <= 20
        assert {line["error"]["code"] for line in bad} == {"storage_limit_reached"}
        assert len(asked) < 100
        output = manager.file_store.file("k", batch.output or "")
        assert output.size + manager.file_store.file("k", "f-b1").size <= 25_000
        sizes = sum(file.size for file in manager.file_store.files("k", None, 9, "asc", None)[0])
        while manager.file_store.quota.used("k") != sizes:
            await asyncio.sleep(0.001)

    living(folder, answering(choose), life, limits=BatchLimits(max_stored=25_000))


def test_uploads_find_no_room_that_answers_under_way_have_taken(folder):
    waiting, first = asyncio.Event(), asyncio.Event()

    async def ask(_: str, __: str, body: bytes) -> ServerReply:
        if first.is_set():
            await waiting.wait()
        first.set()
        return completion(json.loads(body), padding="x" * 5000)

    async def life(manager: BatchManager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(3)))
        while not manager.file_store.quota.used("k") > 5000:
            await asyncio.sleep(0.001)
        assert not manager.file_store.quota.reserve("k", 5000, 10_000)
        assert manager.file_store.quota.reserve("other", 5000, 10_000)
        waiting.set()
        await ended(manager)

    living(folder, ask, life, limits=BatchLimits(max_stored=10_000))


def test_what_a_killed_batch_had_answered_takes_room_when_it_goes_on(folder):
    async def never(_: str, __: str, body: bytes) -> ServerReply:
        if json.loads(body)["prompt"] != "0":
            await asyncio.Event().wait()
        return completion(json.loads(body), padding="x" * 5000)

    async def interrupted(manager: BatchManager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(3)))
        while not manager.with_progress(manager.file_store.batch("k", "b1")).good:
            await asyncio.sleep(0.001)

    async def life(manager: BatchManager) -> None:
        while manager.file_store.quota.used("k") < 5000:
            await asyncio.sleep(0.001)

    living(folder, never, interrupted)
    living(folder, never, life)


def test_a_disk_that_fails_where_the_input_is_gone_is_waited_for(folder, monkeypatch):
    """What is written of a failure fails too: the batch waits, and does not turn in a circle."""
    monkeypatch.setattr(managers, "_PAUSE", 0.01)
    waits: list[str] = []

    async def life(manager: BatchManager) -> None:
        put, wait = manager._save, manager._wait

        async def failing(batch: StoredBatch) -> StoredBatch:
            if len(waits) < 3:
                raise managers.StorageFailed("The disk is full.")
            return await put(batch)

        async def noted(why: str) -> None:
            waits.append(why)
            await wait(why)

        monkeypatch.setattr(manager, "_save", failing)
        monkeypatch.setattr(manager, "_wait", noted)
        begin(manager, *ROWS)
        manager.file_store.contents("f-b1").unlink()
        assert (await ended(manager)).status == "failed"

    living(folder, answering(choose), life)
    assert waits == ["The disk is full."] * 3


def test_files_whose_time_has_come_are_removed_beside_the_batches(folder, monkeypatch):
    monkeypatch.setattr(managers, "_TIDY", 0.001)

    async def life(manager: BatchManager) -> None:
        place = manager.file_store.upload("f1")
        place.write_bytes(b"{}")
        manager.file_store.add(StoredFile("f1", "k", "in", "batch", 2, 0, expires=1), 10**6)
        while place.exists():
            await asyncio.sleep(0.001)

    living(folder, answering(choose), life)
