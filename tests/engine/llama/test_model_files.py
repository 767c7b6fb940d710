"""Tests of the digest of a model's files, and of the detection of changes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from afterword.engine.llama.model_files import HEAD_BYTES, SAMPLE_BYTES, ModelFiles
from afterword.errors import EngineError, SettingError

SIZE = HEAD_BYTES + 100 * SAMPLE_BYTES


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Three sparse files of the same size, which read as zeros."""
    names = [tmp_path / f"m-{number:05}-of-00003.gguf" for number in (1, 2, 3)]
    for path in names:
        path.touch()
        os.truncate(path, SIZE)
        os.utime(path, ns=(10**18, 10**18))
    return [str(path) for path in names]


def write_at(path: str, data: bytes, at: int = 0) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("offset", [0, HEAD_BYTES - 1, HEAD_BYTES, SIZE // 2 + 12345, SIZE - 1])
def test_a_byte_of_any_part_changes_the_digest(paths: list[str], part: int, offset: int) -> None:
    before = ModelFiles(paths).digest()
    assert ModelFiles(paths).digest() == before
    write_at(paths[part], b"x", offset)
    assert ModelFiles(paths).digest() != before


def test_size_number_and_order_of_parts_change_the_digest(paths: list[str]) -> None:
    write_at(paths[0], b"x")
    digests = {ModelFiles(some).digest() for some in (paths, paths[:2], paths[:1], paths[::-1])}
    os.truncate(paths[2], SIZE + 1)
    assert len(digests | {ModelFiles(paths).digest()}) == 5


def overwrite(path: str) -> None:
    write_at(path, b"x", HEAD_BYTES // 2)


def overwrite_and_keep_the_time(path: str) -> None:
    before = os.stat(path)
    write_at(path, b"x", HEAD_BYTES // 2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def shorten(path: str) -> None:
    os.truncate(path, SIZE // 2)


def lengthen(path: str) -> None:
    os.truncate(path, SIZE + 1)


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("change", [overwrite, overwrite_and_keep_the_time, shorten, lengthen])
def test_a_file_that_changes_in_place_is_detected(paths: list[str], part: int, change: Callable[[str], None]) -> None:
    files = ModelFiles(paths)
    assert files.digest()
    files.check()
    change(paths[part])
    with pytest.raises(EngineError, match=f"{Path(paths[part]).name} was changed while it was in use"):
        files.check()
    with pytest.raises(SettingError, match="was changed while it was being loaded"):
        files.confirm_loaded()


def replace(path: str) -> None:
    other = f"{path}.new"
    Path(other).write_bytes(b"other")
    Path(other).replace(path)


@pytest.mark.parametrize("change", [os.unlink, replace, lambda path: Path(path).rename(f"{path}.old")])
def test_an_unlinked_or_replaced_file_is_unchanged_after_loading(
    paths: list[str], change: Callable[[str], None]
) -> None:
    files = ModelFiles(paths)
    assert files.digest()
    change(paths[1])
    files.check()
    with pytest.raises(SettingError, match="was changed while it was being loaded"):
        files.confirm_loaded()


@pytest.mark.parametrize("change", [lambda path: os.chmod(path, 0o600), lambda path: os.link(path, f"{path}.too")])
def test_a_change_of_mode_or_links_is_ignored(paths: list[str], change: Callable[[str], None]) -> None:
    files = ModelFiles(paths)
    assert files.digest()
    change(paths[1])
    files.check()
    files.confirm_loaded()


def test_a_part_that_is_missing_is_a_setting_error(paths: list[str]) -> None:
    os.unlink(paths[2])
    with pytest.raises(SettingError, match=r"00003-of-00003\.gguf cannot be read: No such file"):
        ModelFiles(paths)
