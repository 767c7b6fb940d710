"""Downloads one file from the Hub into a folder with the layout of the Hub's cache, and resumes interrupted downloads.

The Hub's library starts again after every interruption. Therefore this module writes the bytes itself, to a file named
after the content (its ETag) with the suffix `.part`. The complete file gets its name in the cache, and the library
creates the links to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from afterword.errors import SettingError
from afterword.models.download_staging import ListedFile, find_difference

_NAME = re.compile(r"[\w-][\w.-]*")
_LARGEST = 50_000_000_000  # bytes; the Hub serves larger files only by its own protocol, which its library implements


class DownloadObserver:
    """Is notified about the progress of a download. This base class ignores all notifications."""

    def selected(self, name: str, among: Sequence[str]) -> None:
        """The file `name` was selected. `among`: the other files that match."""

    def started(self, name: str, size: int, downloaded: int) -> None:
        """A download starts. `size`: bytes of the file, 0 if unknown. `downloaded`: bytes of it that are here."""

    def received(self, count: int) -> None:
        """`count` more bytes were received; negative if bytes were discarded."""

    def checking(self, name: str) -> None:
        """The file is complete, and its SHA-256 is being compared."""


NO_OBSERVER = DownloadObserver()


def endpoint() -> str | None:
    """The URL of the Hub's mirror, None for the Hub itself."""
    return os.environ.get("HF_ENDPOINT") or None  # read at each call, because the library reads it only at its import


def download_file(repository: str, name: str, listed: ListedFile, folder: Path, observer: DownloadObserver) -> None:
    """Download one file. If it differs from what the Hub lists, download it once more. Raises `SettingError`."""
    wrong = None
    for _ in range(2):
        path = _download(repository, name, listed, folder, observer)
        observer.checking(name)
        wrong = find_difference(path, listed)
        if wrong is None:
            return
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise SettingError(f"{name} {wrong}. Pull it again later.")


def _download(repository: str, name: str, listed: ListedFile, folder: Path, observer: DownloadObserver) -> Path:
    from huggingface_hub import file_download, hf_hub_download, hf_hub_url

    if listed.size < _LARGEST:
        url = hf_hub_url(repository, name, endpoint=endpoint())
        found = file_download.get_hf_file_metadata(url, endpoint=endpoint())
        if found.etag and _NAME.fullmatch(found.etag):
            blobs = folder / f"models--{repository.replace('/', '--')}" / "blobs"
            blobs.mkdir(parents=True, exist_ok=True)
            _complete(url, found.size, name, blobs / found.etag, observer)
    return Path(hf_hub_download(repository, name, cache_dir=folder, endpoint=endpoint()))


def _complete(url: str, size: int | None, name: str, blob: Path, observer: DownloadObserver) -> None:
    """Download the content of a URL to the file `blob`, and continue a partial download. `size`: bytes, if known."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if blob.exists():
        return
    disable_progress_bars()  # the observer shows progress, including the bytes of earlier attempts
    part = blob.with_name(f"{blob.name}.part")
    with part.open("ab") as file:
        if size is not None and file.tell() > size:
            file.truncate(0)
            file.seek(0)
        downloaded = file.tell()
        observer.started(name, size or 0, downloaded)
        counting: Any = _CountingFile(file, observer)
        headers = build_hf_headers()
        file_download.http_get(url, counting, resume_size=downloaded, headers=headers, expected_size=size)
    part.rename(blob)


class _CountingFile:
    """A file that reports its growth to an observer."""

    def __init__(self, file: BinaryIO, observer: DownloadObserver) -> None:
        self._file, self._observer = file, observer

    def write(self, data: bytes) -> int:
        self._observer.received(len(data))
        return self._file.write(data)

    def truncate(self, size: int | None = None) -> int:
        self._file.flush()
        before = os.fstat(self._file.fileno()).st_size
        after = self._file.truncate(size)
        self._observer.received(after - before)
        return after

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)
