"""One file from the Hub into a folder in the layout of the Hub's cache, taken up where an earlier attempt ended.

The Hub's library begins anew after every interruption, so the bytes are kept here: in a file named after the content
that is being downloaded, which gets its name in the cache when it is whole. The library does the rest.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from afterword.errors import SettingError
from afterword.models.download_staging import ListedFile, find_difference

_NAME = re.compile(r"[\w-][\w.-]*")
_LARGEST = 50_000_000_000  # bytes; the Hub serves larger files only in its own protocol, which the library speaks


class DownloadObserver:
    """Hears how a download goes. This one is not interested."""

    def chosen(self, name: str, among: Sequence[str]) -> None:
        """Of several files that would do this one was taken."""

    def started(self, name: str, size: int, have: int) -> None:
        """A file of `size` bytes, 0 if that is not known, of which so many are already here."""

    def received(self, count: int) -> None:
        """So many more bytes of it; negative if some were thrown away."""

    def checking(self, name: str) -> None:
        """It is whole, and its content is being compared."""


NO_OBSERVER = DownloadObserver()


def endpoint() -> str | None:
    """Where the Hub is, if elsewhere than usual."""
    return os.environ.get("HF_ENDPOINT") or None  # read here, as the library reads it once, at import


def download_file(repository: str, name: str, listed: ListedFile, folder: Path, watcher: DownloadObserver) -> None:
    """Download one file; one that is not as it was listed is downloaded once more. Raises `SettingError`."""
    wrong = None
    for _ in range(2):
        path = _download(repository, name, listed, folder, watcher)
        watcher.checking(name)
        wrong = find_difference(path, listed)
        if wrong is None:
            return
        path.resolve().unlink()
        path.unlink(missing_ok=True)
    raise SettingError(f"{name} {wrong}; pull it again later.")


def _download(repository: str, name: str, listed: ListedFile, folder: Path, watcher: DownloadObserver) -> Path:
    from huggingface_hub import file_download, hf_hub_download, hf_hub_url

    if listed.size < _LARGEST:
        url = hf_hub_url(repository, name, endpoint=endpoint())
        found = file_download.get_hf_file_metadata(url, endpoint=endpoint())
        if found.etag and _NAME.fullmatch(found.etag):
            blobs = folder / f"models--{repository.replace('/', '--')}" / "blobs"
            blobs.mkdir(parents=True, exist_ok=True)
            _complete(url, found.size, name, blobs / found.etag, watcher)
    return Path(hf_hub_download(repository, name, cache_dir=folder, endpoint=endpoint()))


def _complete(url: str, size: int | None, name: str, blob: Path, watcher: DownloadObserver) -> None:
    """The content of a URL as a file, of which a part may be there."""
    from huggingface_hub import file_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if blob.exists():
        return
    disable_progress_bars()  # ours knows what was there before
    part = blob.with_name(f"{blob.name}.part")
    with part.open("ab") as file:
        if size is not None and file.tell() > size:
            file.truncate(0)
            file.seek(0)
        have = file.tell()
        watcher.started(name, size or 0, have)
        headers = build_hf_headers()
        file_download.http_get(url, _Counted(file, watcher), resume_size=have, headers=headers, expected_size=size)  # type: ignore[arg-type]
    part.rename(blob)


class _Counted:
    """A file whose growth is told."""

    def __init__(self, file: BinaryIO, watcher: DownloadObserver) -> None:
        self._file, self._watcher = file, watcher

    def write(self, data: bytes) -> int:
        self._watcher.received(len(data))
        return self._file.write(data)

    def truncate(self, size: int | None = None) -> int:
        self._file.flush()
        before = os.fstat(self._file.fileno()).st_size
        after = self._file.truncate(size)
        self._watcher.received(after - before)
        return after

    def __getattr__(self, name: str) -> object:
        return getattr(self._file, name)
