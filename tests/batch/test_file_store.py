"""The folder of files and batches: what is in it is whole, and each key sees its own."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from afterword.api.requests.multipart_upload import _create
from afterword.batch import file_store as shelves
from afterword.batch.file_store import FileStore, StoredBatch, StoredFile, new_id
from afterword.batch.journal import Journal
from afterword.errors import RequestError, SettingError, StorageFailed

MOST = 1000


def put(file_store: FileStore, name: str, key: str = "k", text: bytes = b"{}\n", **facts: Any) -> StoredFile:
    file_store.upload(name).write_bytes(text)
    file = StoredFile(name, key, "in.jsonl", facts.pop("purpose", "batch"), len(text), 1, **facts)
    file_store.add(file, MOST)
    return file


def batch(name: str, key: str = "k", file: str = "f1") -> StoredBatch:
    return StoredBatch(name, key, "/v1/completions", "24h", file, 1, 2)


@pytest.fixture
def shelf(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "data" / "batches")


def test_nothing_is_made_before_the_first_file(shelf):
    assert not shelf.exists
    assert not shelf.folder.parent.exists()


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
@pytest.mark.parametrize("mode", [None, 0o755, 0o777])
def test_only_its_owner_can_read_what_is_in_it(shelf, umask, mode):
    if mode is not None:
        shelf.folder.mkdir(parents=True)
        shelf.folder.chmod(mode)
    before = os.umask(umask)
    try:
        shelf.add(StoredFile(created(shelf.upload("f1")).name, "k", "in.jsonl", "batch", 0, 1), MOST)
        shelf.add_batch(batch("b1"), 9)
        journal = Journal(shelf.journal("b1"))
        journal.write(shelf.upload("f2"), private=True)
        journal.close()
        shelf.close()
    finally:
        os.umask(before)
    modes = {path.relative_to(shelf.folder).as_posix(): path.stat().st_mode & 0o777 for path in shelf.folder.rglob("*")}
    assert modes == {
        "files": 0o700,
        "journals": 0o700,
        "shelf.db": 0o600,
        "files/f1": 0o600,
        "files/f2": 0o600,
        "journals/b1": 0o600,
    }
    assert shelf.folder.stat().st_mode & 0o777 == 0o700


def created(place: Path) -> Path:
    _create(place).close()
    return place


def test_files_are_the_keys_own(shelf):
    put(shelf, "f1", "one")
    put(shelf, "f2", "other")
    assert shelf.file("one", "f1").name == "in.jsonl"
    for ask in (lambda: shelf.file("one", "f2"), lambda: shelf.remove("one", "f2"), lambda: shelf.file("", "f1")):
        with pytest.raises(RequestError) as caught:
            ask()
        assert caught.value.status == 404
    assert [file.id for file in shelf.files("one", None, 9, "desc", None)[0]] == ["f1"]


def test_lists_go_on_after_one(shelf):
    for number in range(5):
        put(shelf, f"f{number}", purpose="batch_output" if number == 3 else "batch")
    assert [file.id for file in shelf.files("k", None, 2, "desc", None)[0]] == ["f4", "f3"]
    files, more = shelf.files("k", "f3", 2, "desc", None)
    assert ([file.id for file in files], more) == (["f2", "f1"], True)
    files, more = shelf.files("k", "f1", 9, "asc", "batch")
    assert ([file.id for file in files], more) == (["f2", "f4"], False)


def test_a_key_has_so_much_room_and_no_more(shelf):
    put(shelf, "f1", text=b"x" * 900)
    with pytest.raises(RequestError) as caught:
        put(shelf, "f2", text=b"x" * 200)
    assert caught.value.code == "storage_limit_reached"
    put(shelf, "f3", "other", text=b"x" * 200)


def test_a_file_that_is_read_is_kept(shelf):
    put(shelf, "f1")
    shelf.add_batch(batch("b1"), 9)
    with pytest.raises(RequestError) as caught:
        shelf.remove("k", "f1")
    assert caught.value.status == 409
    shelf.save_batch(batch("b1").with_status("completed", 5))
    shelf.remove("k", "f1")
    assert not shelf.contents("f1").exists()


def test_a_key_has_so_many_batches_and_no_more(shelf):
    put(shelf, "f1")
    shelf.add_batch(batch("b1"), 1)
    with pytest.raises(RequestError) as caught:
        shelf.add_batch(batch("b2"), 1)
    assert caught.value.code == "too_many_batches"
    shelf.save_batch(batch("b1").with_status("cancelled", 5))
    shelf.add_batch(batch("b2"), 1)
    assert [each.id for each in shelf.unfinished_batches()] == ["b2"]


def test_an_output_is_no_input(shelf):
    put(shelf, "f1", purpose="batch_output")
    with pytest.raises(RequestError, match="another purpose"):
        shelf.add_batch(batch("b1"), 9)


def test_a_batch_that_is_to_be_cancelled_does_not_go_back(shelf):
    put(shelf, "f1")
    shelf.add_batch(batch("b1"), 9)
    shelf.save_batch(batch("b1").with_status("cancelling", 3))
    assert shelf.save_batch(batch("b1").with_status("in_progress", 4)).status == "cancelling"
    assert shelf.batch("k", "b1").status == "cancelling"


def test_a_second_server_is_told_so(shelf):
    put(shelf, "f1")
    with pytest.raises(StorageFailed, match="--batch-dir"):
        FileStore(shelf.folder).unfinished_batches()
    shelf.close()
    assert FileStore(shelf.folder).file("k", "f1")


def test_what_was_half_there_is_removed_at_the_start_and_nothing_else(shelf):
    put(shelf, "f1")
    shelf.add_batch(batch("b1"), 9)
    shelf.add_batch(batch("b2"), 9)
    shelf.save_batch(batch("b2").with_status("completed", 5))
    ours = [shelf.upload(), shelf.upload("f2"), shelf.upload("f2").with_name("f2.part"), shelf.journal("b2")]
    kept = [shelf.journal("b1"), shelf.contents("f1")]
    foreign = [
        shelf.contents("thesis.txt"),
        shelf.contents("file-0123456789abcdef0123456789abcdef"),
        shelf.contents(".upload-0123456789abcdef0123456789abcdef"),
        shelf.journal("b9"),
        shelf.journal("notes-journal"),
        shelf.folder / "thesis.txt",
    ]
    for path in (*ours, *kept, *foreign):
        path.write_bytes(b"")
    shelf.contents("folder").mkdir()
    shelf.close()
    FileStore(shelf.folder).unfinished_batches()
    assert [path.name for path in ours if path.exists()] == []
    assert [path.name for path in (*kept, *foreign, shelf.contents("folder")) if not path.exists()] == []


@pytest.mark.parametrize("name", ["../thesis.txt", "a/b", "..", "."])
def test_a_name_that_leads_elsewhere_is_never_removed(shelf, name):
    put(shelf, "f1")
    (shelf.folder / "thesis.txt").write_bytes(b"")
    shelf.upload(name)
    shelf.close()
    assert FileStore(shelf.folder).file("k", "f1")
    assert (shelf.folder / "thesis.txt").exists()


def other_files(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_bytes(b"text")


def files_of_the_same_name(folder: Path) -> None:
    (folder / "files").mkdir(parents=True)
    (folder / "files" / "thesis.txt").write_bytes(b"text")


def another_database(folder: Path) -> None:
    folder.mkdir(parents=True)
    with sqlite3.connect(folder / "shelf.db") as db:
        db.execute("CREATE TABLE books (name TEXT)")
    db.close()


def another_database_with_a_version(folder: Path) -> None:
    another_database(folder)
    with sqlite3.connect(folder / "shelf.db") as db:
        db.execute("PRAGMA user_version = 2")
    db.close()


def no_database(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "shelf.db").write_bytes(b"no database" * 1000)


FOREIGN = [other_files, files_of_the_same_name, another_database, another_database_with_a_version, no_database]


@pytest.mark.parametrize("fill", FOREIGN, ids=lambda each: each.__name__)
def test_a_folder_that_is_not_ours_is_refused_and_left_as_it_is(shelf, fill):
    fill(shelf.folder)
    before = {path: path.is_file() and (path.read_bytes(), path.stat().st_mode) for path in shelf.folder.rglob("*")}
    with pytest.raises(SettingError, match=str(shelf.folder)):
        shelf.check()
    with pytest.raises(StorageFailed, match="--batch-dir") as caught:
        put(shelf, "f1")
    assert str(shelf.folder) not in caught.value.message
    after = {path: path.is_file() and (path.read_bytes(), path.stat().st_mode) for path in shelf.folder.rglob("*")}
    assert after == before


def test_a_file_where_the_folder_should_be_is_one_sentence(shelf):
    shelf.folder.parent.mkdir()
    shelf.folder.write_bytes(b"")
    with pytest.raises(SettingError, match="no folder of Afterword's"):
        shelf.check()


@pytest.mark.parametrize("names", [(), ("lost+found",), ("files", "journals")])
def test_an_empty_folder_is_taken(shelf, names):
    for name in names:
        (shelf.folder / name).mkdir(parents=True)
    shelf.check()
    put(shelf, "f1")
    shelf.close()
    shelf.check()


def test_a_folder_of_the_version_before_goes_on(shelf):
    put(shelf, "f1")
    shelf.close()
    with sqlite3.connect(shelf.folder / "shelf.db") as db:
        db.executescript("DROP TABLE unfinished; ALTER TABLE files DROP COLUMN expires; PRAGMA user_version = 1;")
    db.close()
    again = FileStore(shelf.folder)
    assert again.file("k", "f1").expires is None
    put(again, "f2")
    assert [file.id for file in again.files("k", None, 9, "asc", None)[0]] == ["f1", "f2"]


@pytest.mark.parametrize(("table", "facts"), [("files", b"{"), ("files", b'{"id":1}'), ("batches", b"\xff")])
def test_a_row_that_is_not_as_expected_is_left_out_and_the_rest_goes_on(shelf, caplog, table, facts):
    for name in ("f1", "f2"):
        put(shelf, name)
    for number in (1, 2):
        shelf.add_batch(batch(f"b{number}", file="f2"), 9)
    shelf.close()
    with sqlite3.connect(shelf.folder / "shelf.db") as db:
        db.execute(f"UPDATE {table} SET facts = ? WHERE number = 1", (facts,))
    db.close()
    again = FileStore(shelf.folder)
    files, batches = again.files("k", None, 9, "asc", None)[0], again.unfinished_batches()
    assert ([file.id for file in files], [each.id for each in batches]) == (
        (["f2"], ["b1", "b2"]) if table == "files" else (["f1", "f2"], ["b2"])
    )
    put(again, "f3")
    assert "is not as expected" in caplog.text


def test_what_is_being_written_counts_too(shelf):
    put(shelf, "f1", text=b"x" * 400)
    assert [shelf.quota.reserve("k", 300, MOST) for _ in range(3)] == [True, True, False]
    shelf.quota.release("k", 300)
    with pytest.raises(RequestError):
        put(shelf, "f2", text=b"x" * 301)
    put(shelf, "f3", text=b"x" * 300)
    shelf.remove("k", "f1")
    assert shelf.quota.used("k") == 600
    shelf.close()
    again = FileStore(shelf.folder)
    again.unfinished_batches()
    assert again.quota.used("k") == 300


def test_a_file_is_gone_when_its_time_has_come(tmp_path):
    now = [100.0]
    file_store = FileStore(tmp_path / "batches", lambda: now[0])
    for name, expires in (("f1", None), ("f2", 200), ("f3", 200)):
        put(file_store, name, expires=expires)
    file_store.add_batch(batch("b1", file="f3"), 9)
    file_store.expire()
    assert file_store.file("k", "f2").expires == 200
    now[0] = 200.0
    assert [file.id for file in file_store.files("k", None, 9, "asc", None)[0]] == ["f1"]
    for ask in (lambda: file_store.file("k", "f2"), lambda: file_store.add_batch(batch("b2", file="f2"), 9)):
        with pytest.raises(RequestError) as caught:
            ask()
        assert caught.value.status == 404
    file_store.expire()
    assert sorted(path.name for path in (file_store.folder / "files").iterdir()) == ["f1", "f3"], (
        "a batch still reads f3"
    )
    file_store.save_batch(batch("b1", file="f3").with_status("completed", 5))
    file_store.expire()
    assert [path.name for path in (file_store.folder / "files").iterdir()] == ["f1"]
    assert file_store.quota.used("k") == 3


def test_a_full_disk_leaves_nothing_half_written(shelf, monkeypatch):
    put(shelf, "f1")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shelves, "sync_folder", full)
    with pytest.raises(StorageFailed) as caught:
        put(shelf, "f2")
    assert caught.value.status == 507
    assert str(shelf.folder) not in caught.value.message
    monkeypatch.undo()
    assert [file.id for file in shelf.files("k", None, 9, "asc", None)[0]] == ["f1"]
    put(shelf, "f2")


def test_names_are_hard_to_guess():
    assert len({new_id("file-") for _ in range(100)}) == 100
    assert len(new_id("")) == 32
