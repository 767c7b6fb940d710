"""The folder of files and batches: what is in it is whole, and each key sees its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from afterword.batch import shelf as shelves
from afterword.batch.shelf import Batch, File, Shelf, new_id
from afterword.errors import RequestError, StorageFailed

MOST = 1000


def put(shelf: Shelf, name: str, key: str = "k", text: bytes = b"{}\n", purpose: str = "batch") -> File:
    place = shelf.upload()
    place.write_bytes(text)
    file = File(name, key, "in.jsonl", purpose, len(text), 1)
    shelf.add(file, place, MOST)
    return file


def batch(name: str, key: str = "k", file: str = "f1") -> Batch:
    return Batch(name, key, "/v1/completions", "24h", file, 1, 2)


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "data" / "batches")


def test_nothing_is_made_before_the_first_file(shelf):
    assert not shelf.exists
    assert not shelf.folder.parent.exists()


def test_only_its_owner_can_read_it(shelf):
    put(shelf, "f1")
    assert shelf.folder.stat().st_mode & 0o077 == 0


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
    shelf.begin(batch("b1"), 9)
    with pytest.raises(RequestError) as caught:
        shelf.remove("k", "f1")
    assert caught.value.status == 409
    shelf.put(batch("b1").at("completed", 5))
    shelf.remove("k", "f1")
    assert not shelf.contents("f1").exists()


def test_a_key_has_so_many_batches_and_no_more(shelf):
    put(shelf, "f1")
    shelf.begin(batch("b1"), 1)
    with pytest.raises(RequestError) as caught:
        shelf.begin(batch("b2"), 1)
    assert caught.value.code == "too_many_batches"
    shelf.put(batch("b1").at("cancelled", 5))
    shelf.begin(batch("b2"), 1)
    assert [each.id for each in shelf.unended()] == ["b2"]


def test_an_output_is_no_input(shelf):
    put(shelf, "f1", purpose="batch_output")
    with pytest.raises(RequestError, match="another purpose"):
        shelf.begin(batch("b1"), 9)


def test_a_batch_that_is_to_be_cancelled_does_not_go_back(shelf):
    put(shelf, "f1")
    shelf.begin(batch("b1"), 9)
    shelf.put(batch("b1").at("cancelling", 3))
    assert shelf.put(batch("b1").at("in_progress", 4)).status == "cancelling"
    assert shelf.batch("k", "b1").status == "cancelling"


def test_a_second_server_is_told_so(shelf):
    put(shelf, "f1")
    with pytest.raises(StorageFailed, match="--batch-dir"):
        Shelf(shelf.folder).unended()
    shelf.close()
    assert Shelf(shelf.folder).file("k", "f1")


def test_what_was_half_there_is_thrown_away_at_the_start(shelf):
    put(shelf, "f1")
    shelf.begin(batch("b1"), 9)
    for path in (shelf.upload(), shelf.contents("f9"), shelf.journal("b9"), shelf.journal("b1"), shelf.contents("f1")):
        path.write_bytes(b"")
    shelf.close()
    Shelf(shelf.folder).unended()
    assert [path.name for path in (shelf.folder / "files").iterdir()] == ["f1"]
    assert [path.name for path in (shelf.folder / "journals").iterdir()] == ["b1"]


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
