"""The file store: its folder, modes, limits, expiry, and the separation of keys."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from pathlib import Path
from typing import Any

import msgspec
import pytest

from afterword.api.requests.multipart_upload import _create
from afterword.batch import file_store as file_stores
from afterword.batch.file_store import FileStore
from afterword.batch.journal import Journal
from afterword.batch.stored_items import BatchError, StoredBatch, StoredFile, new_id
from afterword.errors import RequestError, SettingError, StorageFailed

MOST = 1000


def put(store: FileStore, name: str, key: str = "k", text: bytes = b"{}\n", **facts: Any) -> StoredFile:
    store.upload(name).write_bytes(text)
    file = StoredFile(name, key, "in.jsonl", facts.pop("purpose", "batch"), len(text), 1, **facts)
    store.add(file, MOST)
    return file


def batch(name: str, key: str = "k", file: str = "f1") -> StoredBatch:
    return StoredBatch(name, key, "/v1/completions", "24h", file, 1, 2)


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "data" / "batches")


def test_the_folder_is_not_created_before_the_first_upload(store):
    assert not store.exists
    assert not store.folder.parent.exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_only_the_owner_can_read_files_and_folders(store, umask, mode):
    if mode is not None:
        store.folder.mkdir(parents=True)
        store.folder.chmod(mode)
    before = os.umask(umask)
    try:
        store.add(StoredFile(created(store.upload("f1")).name, "k", "in.jsonl", "batch", 0, 1), MOST)
        store.add_batch(batch("b1"), 9)
        journal = Journal(store.journal("b1"))
        journal.write(store.upload("f2"), private=True)
        journal.close()
        store.close()
    finally:
        os.umask(before)
    modes = {path.relative_to(store.folder).as_posix(): path.stat().st_mode & 0o777 for path in store.folder.rglob("*")}
    assert modes == {
        "files": 0o700,
        "journals": 0o700,
        "files.db": 0o600,
        "files/f1": 0o600,
        "files/f2": 0o600,
        "journals/b1": 0o600,
    }
    assert store.folder.stat().st_mode & 0o777 == 0o700


def created(path: Path) -> Path:
    _create(path).close()
    return path


def test_a_key_sees_only_its_own_files(store):
    put(store, "f1", "one")
    put(store, "f2", "other")
    assert store.file("one", "f1").name == "in.jsonl"
    for call in (lambda: store.file("one", "f2"), lambda: store.remove("one", "f2"), lambda: store.file("", "f1")):
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.status == 404
    assert [file.id for file in store.files("one", None, 9, "desc", None)[0]] == ["f1"]


def test_lists_continue_after_a_given_file(store):
    for number in range(5):
        put(store, f"f{number}", purpose="batch_output" if number == 3 else "batch")
    assert [file.id for file in store.files("k", None, 2, "desc", None)[0]] == ["f4", "f3"]
    files, more = store.files("k", "f3", 2, "desc", None)
    assert ([file.id for file in files], more) == (["f2", "f1"], True)
    files, more = store.files("k", "f1", 9, "asc", "batch")
    assert ([file.id for file in files], more) == (["f2", "f4"], False)


def test_a_file_over_the_storage_limit_of_its_key_is_refused(store):
    put(store, "f1", text=b"x" * 900)
    with pytest.raises(RequestError) as caught:
        put(store, "f2", text=b"x" * 200)
    assert caught.value.code == "storage_limit_reached"
    put(store, "f3", "other", text=b"x" * 200)


def test_a_file_that_is_read_is_kept(store):
    put(store, "f1")
    store.add_batch(batch("b1"), 9)
    with pytest.raises(RequestError) as caught:
        store.remove("k", "f1")
    assert caught.value.status == 409
    store.save_batch(batch("b1").with_status("completed", 5))
    store.remove("k", "f1")
    assert not store.contents("f1").exists()


def test_a_batch_over_the_limit_of_its_key_is_refused(store):
    put(store, "f1")
    store.add_batch(batch("b1"), 1)
    with pytest.raises(RequestError) as caught:
        store.add_batch(batch("b2"), 1)
    assert caught.value.code == "too_many_batches"
    store.save_batch(batch("b1").with_status("cancelled", 5))
    store.add_batch(batch("b2"), 1)
    assert [each.id for each in store.unfinished_batches()] == ["b2"]


def test_an_output_file_cannot_be_the_input_of_a_batch(store):
    put(store, "f1", purpose="batch_output")
    with pytest.raises(RequestError, match="must have the purpose"):
        store.add_batch(batch("b1"), 9)


def test_a_cancelling_batch_does_not_return_to_an_earlier_status(store):
    put(store, "f1")
    store.add_batch(batch("b1"), 9)
    store.save_batch(batch("b1").with_status("cancelling", 3))
    assert store.save_batch(batch("b1").with_status("in_progress", 4)).status == "cancelling"
    assert store.batch("k", "b1").status == "cancelling"


def test_a_second_server_on_the_same_folder_is_refused(store):
    put(store, "f1")
    with pytest.raises(StorageFailed, match="--batch-dir"):
        FileStore(store.folder).unfinished_batches()
    store.close()
    assert FileStore(store.folder).file("k", "f1")


def test_only_unfinished_files_are_deleted_at_the_start(store):
    put(store, "f1")
    store.add_batch(batch("b1"), 9)
    store.add_batch(batch("b2"), 9)
    store.save_batch(batch("b2").with_status("completed", 5))
    unfinished = [store.upload(), store.upload("f2"), store.upload("f2").with_name("f2.part"), store.journal("b2")]
    kept = [store.journal("b1"), store.contents("f1")]
    foreign = [
        store.contents("thesis.txt"),
        store.contents("file-0123456789abcdef0123456789abcdef"),
        store.contents(".upload-0123456789abcdef0123456789abcdef"),
        store.journal("b9"),
        store.journal("notes-journal"),
        store.folder / "thesis.txt",
    ]
    for path in (*unfinished, *kept, *foreign):
        path.write_bytes(b"")
    store.contents("folder").mkdir()
    store.close()
    FileStore(store.folder).unfinished_batches()
    assert [path.name for path in unfinished if path.exists()] == []
    assert [path.name for path in (*kept, *foreign, store.contents("folder")) if not path.exists()] == []


@pytest.mark.parametrize("name", ["../thesis.txt", "a/b", "..", "."])
def test_a_name_outside_the_folder_is_never_deleted(store, name):
    put(store, "f1")
    (store.folder / "thesis.txt").write_bytes(b"")
    store.upload(name)
    store.close()
    assert FileStore(store.folder).file("k", "f1")
    assert (store.folder / "thesis.txt").exists()


def other_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_bytes(b"text")


def files_of_the_same_name(folder: Path) -> None:
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "thesis.txt").write_bytes(b"text")


def another_database(folder: Path) -> None:
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "files.db") as db:
        db.execute("CREATE TABLE books (name TEXT)")
    db.close()


def another_database_with_a_version(folder: Path) -> None:
    another_database(folder)
    with sqlite3.connect(folder / "files.db") as db:
        db.execute("PRAGMA user_version = 2")
    db.close()


def no_database(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "files.db").write_bytes(b"no database" * 1000)


def another_database_of_the_old_name(folder: Path) -> None:
    another_database(folder)
    (folder / "files.db").rename(folder / "shelf.db")


FOREIGN = [
    *(other_files, files_of_the_same_name, another_database, another_database_with_a_version, no_database),
    another_database_of_the_old_name,
]


@pytest.mark.parametrize("fill", FOREIGN, ids=lambda each: each.__name__)
def test_a_foreign_folder_is_refused_and_not_changed(store, fill):
    fill(store.folder)
    before = {path: path.is_file() and (path.read_bytes(), path.stat().st_mode) for path in store.folder.rglob("*")}
    with pytest.raises(SettingError, match=str(store.folder)):
        store.check()
    with pytest.raises(StorageFailed, match="--batch-dir") as caught:
        put(store, "f1")
    assert str(store.folder) not in caught.value.message
    after = {path: path.is_file() and (path.read_bytes(), path.stat().st_mode) for path in store.folder.rglob("*")}
    assert after == before


def test_a_file_in_place_of_the_folder_is_refused(store):
    store.folder.parent.mkdir()
    store.folder.write_bytes(b"")
    with pytest.raises(SettingError, match="files that Afterword did not create"):
        store.check()


@pytest.mark.parametrize("names", [(), ("lost+found",), ("files", "journals")])
def test_an_empty_folder_is_accepted(store, names):
    for name in names:
        (store.folder / name).mkdir(parents=True)
    store.check()
    put(store, "f1")
    store.close()
    store.check()


def test_a_database_of_the_old_name_stays_in_use(store):
    put(store, "f1")
    store.add_batch(batch("b1"), 9)
    store.close()
    (store.folder / "files.db").rename(store.folder / "shelf.db")
    again = FileStore(store.folder)
    again.check()
    assert again.exists
    put(again, "f2")
    assert [file.id for file in again.files("k", None, 9, "asc", None)[0]] == ["f1", "f2"]
    assert [each.id for each in again.unfinished_batches()] == ["b1"]
    assert not (store.folder / "files.db").exists()


def test_the_names_in_the_database_stay_the_same(store):
    put(store, "f1")
    store.add_batch(batch("b1"), 9)
    store.close()
    facts = b"""{"id":"b1","key":"k","endpoint":"/v1/completions","window":"24h","input":"f1","created":1,"expires":2,
        "metadata":null,"status":"completed","times":{"completed":3},"wrong":[{"code":"c","message":"m","line":4}],
        "output":"f2","errors":"f3","rows":9,"good":7,"bad":2,"prompt":5,"completion":6,"cached":1}"""
    with sqlite3.connect(store.folder / "files.db") as db:
        db.execute("UPDATE batches SET facts = ?", (facts,))
    db.close()
    found = FileStore(store.folder).batch("k", "b1")
    assert (found.input_file, found.output_file, found.error_file) == ("f1", "f2", "f3")
    assert (found.lines, found.succeeded, found.failed) == (9, 7, 2)
    assert found.errors == (BatchError("c", "m", 4),)
    assert json.loads(msgspec.json.encode(found)) == json.loads(facts)


def test_a_folder_of_version_1_is_migrated(store):
    put(store, "f1")
    store.close()
    with sqlite3.connect(store.folder / "files.db") as db:
        db.executescript("DROP TABLE unfinished; ALTER TABLE files DROP COLUMN expires; PRAGMA user_version = 1;")
    db.close()
    again = FileStore(store.folder)
    assert again.file("k", "f1").expires is None
    put(again, "f2")
    assert [file.id for file in again.files("k", None, 9, "asc", None)[0]] == ["f1", "f2"]


@pytest.mark.parametrize(("table", "facts"), [("files", b"{"), ("files", b'{"id":1}'), ("batches", b"\xff")])
def test_a_row_that_cannot_be_decoded_is_ignored(store, caplog, table, facts):
    for name in ("f1", "f2"):
        put(store, name)
    for number in (1, 2):
        store.add_batch(batch(f"b{number}", file="f2"), 9)
    store.close()
    with sqlite3.connect(store.folder / "files.db") as db:
        db.execute(f"UPDATE {table} SET facts = ? WHERE number = 1", (facts,))
    db.close()
    again = FileStore(store.folder)
    files, batches = again.files("k", None, 9, "asc", None)[0], again.unfinished_batches()
    assert ([file.id for file in files], [each.id for each in batches]) == (
        (["f2"], ["b1", "b2"]) if table == "files" else (["f1", "f2"], ["b2"])
    )
    put(again, "f3")
    assert "cannot be decoded" in caplog.text


def test_reserved_bytes_count_against_the_limit(store):
    put(store, "f1", text=b"x" * 400)
    assert [store.quota.reserve("k", 300, MOST) for _ in range(3)] == [True, True, False]
    store.quota.release("k", 300)
    with pytest.raises(RequestError):
        put(store, "f2", text=b"x" * 301)
    put(store, "f3", text=b"x" * 300)
    store.remove("k", "f1")
    assert store.quota.used("k") == 600
    store.close()
    again = FileStore(store.folder)
    again.unfinished_batches()
    assert again.quota.used("k") == 300


def test_an_expired_file_is_hidden_and_deleted(tmp_path):
    now = [100.0]
    store = FileStore(tmp_path / "batches", lambda: now[0])
    for name, expires in (("f1", None), ("f2", 200), ("f3", 200)):
        put(store, name, expires=expires)
    store.add_batch(batch("b1", file="f3"), 9)
    store.expire()
    assert store.file("k", "f2").expires == 200
    now[0] = 200.0
    assert [file.id for file in store.files("k", None, 9, "asc", None)[0]] == ["f1"]
    for call in (lambda: store.file("k", "f2"), lambda: store.add_batch(batch("b2", file="f2"), 9)):
        with pytest.raises(RequestError) as caught:
            call()
        assert caught.value.status == 404
    store.expire()
    assert sorted(path.name for path in (store.folder / "files").iterdir()) == ["f1", "f3"], "a batch still reads f3"
    store.save_batch(batch("b1", file="f3").with_status("completed", 5))
    store.expire()
    assert [path.name for path in (store.folder / "files").iterdir()] == ["f1"]
    assert store.quota.used("k") == 3


def test_a_full_disk_leaves_no_partial_file(store, monkeypatch):
    put(store, "f1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(file_stores, "sync_path", full)
    with pytest.raises(StorageFailed) as caught:
        put(store, "f2")
    assert caught.value.status == 507
    assert str(store.folder) not in caught.value.message
    monkeypatch.undo()
    assert [file.id for file in store.files("k", None, 9, "asc", None)[0]] == ["f1"]
    put(store, "f2")


def test_ids_are_random():
    assert len({new_id("file-") for _ in range(100)}) == 100
    assert len(new_id("")) == 32
