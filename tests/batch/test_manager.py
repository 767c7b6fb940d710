"""Batches in the background: they end as they should, in turn by key, also across a restart."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from making import CREATED, answering, bare, completion, wrapped

from afterword.batch import job as jobs
from afterword.batch import manager as managers
from afterword.batch.answers import Ask, Reply
from afterword.batch.limits import BatchLimits
from afterword.batch.manager import Manager
from afterword.batch.shelf import ENDED, Batch, File, Shelf
from afterword.errors import RequestError

ROWS = (wrapped("a", prompt="one"), wrapped("b", prompt="bad"), wrapped("c", prompt="two"))
Life = Callable[[Manager], Coroutine[Any, Any, Any]]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_PAUSE", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "batches"


def choose(request: dict[str, Any]) -> Reply:
    return Reply(400, b'{"error":{}}') if request["prompt"] == "bad" else completion(request)


def living(folder: Path, ask: Ask | Callable[[str], Ask], life: Life, **how: Any) -> Any:
    """A server's batches, for as long as something lasts."""
    ask_for = how.pop("ask_for", lambda _: ask)

    async def main() -> Any:
        manager = Manager(Shelf(folder), how.pop("limits", BatchLimits()), how.pop("clock", lambda: CREATED))
        async with asyncio.timeout(30), manager.kept(ask_for):
            return await life(manager)

    return asyncio.run(main())


def begin(manager: Manager, *rows: bytes, key: str = "k", name: str = "b1", expires: int = CREATED + 9) -> None:
    place = manager.shelf.upload(f"f-{name}")
    place.write_bytes(b"\n".join(rows))
    manager.shelf.add(File(place.name, key, "in", "batch", place.stat().st_size, CREATED), 10**6)
    manager.shelf.begin(Batch(name, key, "/v1/completions", "24h", place.name, CREATED, expires), 9)
    manager.begun()


async def ended(manager: Manager, key: str = "k", name: str = "b1") -> Batch:
    while (batch := manager.shelf.batch(key, name)).status not in ENDED:
        await asyncio.sleep(0.001)
    return batch


def lines(manager: Manager, file: str | None) -> list[dict[str, Any]]:
    assert file is not None
    return [json.loads(line) for line in manager.shelf.contents(file).read_bytes().splitlines()]


def test_answers_and_errors_come_in_files_of_their_own(folder):
    async def life(manager: Manager) -> None:
        begin(manager, *ROWS)
        batch = await ended(manager)
        assert (batch.status, batch.rows, batch.good, batch.bad) == ("completed", 3, 2, 1)
        assert list(batch.times) == ["in_progress", "finalizing", "completed"]
        assert [line["custom_id"] for line in lines(manager, batch.output)] == ["a", "c"]
        assert [line["custom_id"] for line in lines(manager, batch.errors)] == ["b"]
        assert manager.shelf.file("k", batch.output or "").purpose == "batch_output"

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
    async def life(manager: Manager) -> None:
        begin(manager, *rows)
        batch = await ended(manager)
        assert batch.status == "failed"
        assert [(each.code, each.line) for each in batch.wrong] == wrong
        assert (batch.output, batch.errors) == (None, None)

    def never(_: object) -> Reply:
        raise AssertionError

    living(folder, answering(never), life, limits=BatchLimits(max_rows=4))


def test_a_cancelled_batch_keeps_what_was_answered(folder):
    first = asyncio.Event()

    async def ask(_: str, __: str, body: bytes) -> Reply:
        if first.is_set():
            await asyncio.Event().wait()
        first.set()
        return completion(json.loads(body))

    async def life(manager: Manager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(40)))
        while not (batch := manager.now(manager.shelf.batch("k", "b1"))).good:
            await asyncio.sleep(0.001)
        assert (await manager.cancel("k", "b1")).status == "cancelling"
        batch = await ended(manager)
        assert (batch.status, batch.good, batch.bad, batch.rows) == ("cancelled", 1, 0, 40)
        assert len(lines(manager, batch.output)) == 1
        assert (await manager.cancel("k", "b1")).status == "cancelled"  # once more changes nothing

    living(folder, ask, life)


def test_only_its_key_can_cancel_it(folder):
    async def life(manager: Manager) -> None:
        begin(manager, *ROWS)
        with pytest.raises(RequestError):
            await manager.cancel("other", "b1")

    living(folder, answering(choose), life)


def test_what_is_not_answered_in_time_is_given_up(folder):
    async def ask(_: str, __: str, body: bytes) -> Reply:
        if json.loads(body)["prompt"] != "one":
            await asyncio.Event().wait()
        return completion({})

    now = [float(CREATED)]

    async def life(manager: Manager) -> None:
        begin(manager, *ROWS, expires=CREATED + 1)
        batch = await ended(manager)
        assert (batch.status, batch.good, batch.bad) == ("expired", 1, 2)
        assert [line["error"]["code"] for line in lines(manager, batch.errors)] == ["batch_expired"] * 2

    living(folder, ask, life, clock=lambda: now[0])


def test_a_restarted_server_goes_on(folder):
    asked: list[str] = []

    def hold(many: int) -> Ask:
        async def ask(_: str, __: str, body: bytes) -> Reply:
            if len(asked) >= many:
                await asyncio.Event().wait()
            asked.append(json.loads(body)["prompt"])
            return completion(json.loads(body))

        return ask

    async def interrupted(manager: Manager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(60)))
        while manager.now(manager.shelf.batch("k", "b1")).good < 20:
            await asyncio.sleep(0.001)

    async def life(manager: Manager) -> None:
        batch = await ended(manager)
        assert (batch.status, batch.good) == ("completed", 60)
        assert [line["custom_id"] for line in lines(manager, batch.output)] == [f"row-{n}" for n in range(1, 61)]

    living(folder, hold(20), interrupted)
    living(folder, hold(1000), life)
    assert sorted(asked, key=int) == [str(number) for number in range(60)]


@pytest.mark.parametrize("status", ["finalizing", "cancelling"])
def test_a_server_that_was_killed_at_the_end_writes_it_again(folder, status):
    async def killed(manager: Manager) -> None:
        begin(manager, *ROWS)
        put = manager.shelf.put
        reached = asyncio.Event()

        def note(batch: Batch, files: Any = ()) -> Batch:
            if batch.status in ENDED:
                reached.set()
                raise RuntimeError("killed here")
            return put(batch, files)

        manager.shelf.put = note  # type: ignore[method-assign]
        await reached.wait()
        if status == "cancelling":
            put(manager.shelf.batch("k", "b1").at("cancelling", CREATED))

    async def life(manager: Manager) -> None:
        batch = await ended(manager)
        assert batch.status == ("cancelled" if status == "cancelling" else "completed")
        assert [line["custom_id"] for line in lines(manager, batch.output)] == ["a", "c"]

    living(folder, answering(choose), killed)
    living(folder, answering(choose), life)


def test_keys_do_not_wait_for_each_others_batches_and_have_one_at_a_time(folder):
    going = asyncio.Event()
    asked: list[str] = []

    def ask_for(key: str) -> Ask:
        async def ask(_: str, __: str, body: bytes) -> Reply:
            asked.append(f"{key} {json.loads(body)['prompt']}")
            if key == "k":
                await going.wait()
            return completion({})

        return ask

    async def life(manager: Manager) -> None:
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

    async def life(manager: Manager) -> None:
        begin(manager, *ROWS)
        batch = await ended(manager)
        assert (batch.status, batch.good, batch.bad) == ("completed", 2, 1)

    living(folder, answering(choose), life)
    assert left[0] < 0


def test_a_file_that_somebody_has_taken_away_fails_its_batch(folder):
    async def life(manager: Manager) -> None:
        begin(manager, *ROWS)
        manager.shelf.contents("f-b1").unlink()
        batch = await ended(manager)
        assert (batch.status, [each.code for each in batch.wrong]) == ("failed", ["input_file_unreadable"])

    living(folder, answering(choose), life)


def test_another_servers_folder_is_waited_for_and_told_once(folder, monkeypatch, caplog):
    monkeypatch.setattr(managers, "_PAUSE", 0.01)

    async def first(manager: Manager) -> None:
        begin(manager, *ROWS)
        manager.shelf.unended()
        other = Manager(Shelf(folder), BatchLimits())
        tries: list[None] = []
        look = other.shelf.unended

        def note() -> list[Batch]:
            tries.append(None)
            return look()

        monkeypatch.setattr(other.shelf, "unended", note)
        async with other.kept(lambda _: answering(choose)):
            while len(tries) < 3:
                await asyncio.sleep(0.01)

    async def hold(_: str, __: str, ___: bytes) -> Reply:
        await asyncio.Event().wait()
        raise AssertionError

    living(folder, hold, first)
    assert len([record for record in caplog.records if "--batch-dir" in record.message]) == 1


# ---- room


def test_answers_for_which_there_is_no_room_are_errors_of_their_rows(folder):
    """What fits is kept; what was answered beside it is said to have no room, and nothing more is asked."""
    asked: list[str] = []

    def choose(request: dict[str, Any]) -> Reply:
        asked.append(request["prompt"])
        return completion(request, padding="x" * 1000)

    async def life(manager: Manager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(200)))
        batch = await ended(manager)
        assert (batch.status, batch.rows, batch.good + batch.bad) == ("completed", 200, 200)
        good, bad = lines(manager, batch.output), lines(manager, batch.errors)
        assert 5 <= len(good) <= 20
        assert {line["error"]["code"] for line in bad} == {"storage_limit_reached"}
        assert len(asked) < 100
        output = manager.shelf.file("k", batch.output or "")
        assert output.size + manager.shelf.file("k", "f-b1").size <= 25_000
        sizes = sum(file.size for file in manager.shelf.files("k", None, 9, "asc", None)[0])
        while manager.shelf.room.taken("k") != sizes:
            await asyncio.sleep(0.001)

    living(folder, answering(choose), life, limits=BatchLimits(max_stored=25_000))


def test_uploads_find_no_room_that_answers_under_way_have_taken(folder):
    waiting, first = asyncio.Event(), asyncio.Event()

    async def ask(_: str, __: str, body: bytes) -> Reply:
        if first.is_set():
            await waiting.wait()
        first.set()
        return completion(json.loads(body), padding="x" * 5000)

    async def life(manager: Manager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(3)))
        while not manager.shelf.room.taken("k") > 5000:
            await asyncio.sleep(0.001)
        assert not manager.shelf.room.take("k", 5000, 10_000)
        assert manager.shelf.room.take("other", 5000, 10_000)
        waiting.set()
        await ended(manager)

    living(folder, ask, life, limits=BatchLimits(max_stored=10_000))


def test_what_a_killed_batch_had_answered_takes_room_when_it_goes_on(folder):
    async def never(_: str, __: str, body: bytes) -> Reply:
        if json.loads(body)["prompt"] != "0":
            await asyncio.Event().wait()
        return completion(json.loads(body), padding="x" * 5000)

    async def interrupted(manager: Manager) -> None:
        begin(manager, *(bare(prompt=str(number)) for number in range(3)))
        while not manager.now(manager.shelf.batch("k", "b1")).good:
            await asyncio.sleep(0.001)

    async def life(manager: Manager) -> None:
        while manager.shelf.room.taken("k") < 5000:
            await asyncio.sleep(0.001)

    living(folder, never, interrupted)
    living(folder, never, life)


def test_a_disk_that_fails_where_the_input_is_gone_is_waited_for(folder, monkeypatch):
    """What is written of a failure fails too: the batch waits, and does not turn in a circle."""
    monkeypatch.setattr(managers, "_PAUSE", 0.01)
    waits: list[str] = []

    async def life(manager: Manager) -> None:
        put, wait = manager._put, manager._wait

        async def failing(batch: Batch) -> Batch:
            if len(waits) < 3:
                raise managers.StorageFailed("The disk is full.")
            return await put(batch)

        async def noted(why: str) -> None:
            waits.append(why)
            await wait(why)

        monkeypatch.setattr(manager, "_put", failing)
        monkeypatch.setattr(manager, "_wait", noted)
        begin(manager, *ROWS)
        manager.shelf.contents("f-b1").unlink()
        assert (await ended(manager)).status == "failed"

    living(folder, answering(choose), life)
    assert waits == ["The disk is full."] * 3


def test_files_whose_time_has_come_are_removed_beside_the_batches(folder, monkeypatch):
    monkeypatch.setattr(managers, "_TIDY", 0.001)

    async def life(manager: Manager) -> None:
        place = manager.shelf.upload("f1")
        place.write_bytes(b"{}")
        manager.shelf.add(File("f1", "k", "in", "batch", 2, 0, expires=1), 10**6)
        while place.exists():
            await asyncio.sleep(0.001)

    living(folder, answering(choose), life)
