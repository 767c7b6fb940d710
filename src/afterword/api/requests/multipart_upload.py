"""A `multipart/form-data` body, its file straight to the disk: what is held in memory is one piece of what comes."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from afterword.batch.batch_limits import BatchLimits
from afterword.batch.file_store import FileStore, quota_error
from afterword.batch.journal import make_private
from afterword.errors import RequestError, StorageFailed

logging.getLogger("python_multipart").setLevel(logging.ERROR)  # what is wrong with a body is its sender's matter
_MOST_PARTS, _LONGEST_VALUE, _LONGEST_NAME = 16, 1024, 256
_HEADS = 64 * 1024  # bytes of a body beside its file: heads of parts, and fields
_NOT_ONE = "The body must be multipart/form-data with a boundary, and whole."


@dataclass(slots=True)
class UploadedForm:
    """What has come. `name` is that of the file, None while there is none; `size` are its bytes.

    `reserved_bytes`: bytes of its key's room that it has taken. `keep`: it is a file now, and stays where it is.
    """

    path: Path
    fields: dict[str, str] = field(default_factory=dict)
    name: str | None = None
    size: int = 0
    reserved_bytes: int = 0
    keep: bool = False


@asynccontextmanager
async def receive_upload(
    request: Request, file_store: FileStore, limits: BatchLimits, key: str
) -> AsyncIterator[UploadedForm]:
    """A body with one file named `file`, which lies at `path`, and is removed when this is left unless it is `keep`.

    Raises `RequestError` if it is something else or larger than a file of this key may be, and `StorageFailed`.
    """
    most = limits.max_upload
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise RequestError(_NOT_ONE)
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError("A compressed body is not accepted: send it without Content-Encoding.", status=415)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > most + _HEADS:
        raise _too_large(most)
    form = UploadedForm(await asyncio.to_thread(file_store.upload))
    try:
        with await asyncio.to_thread(_created, form.path) as file:
            room = partial(file_store.quota.reserve, key, most=limits.max_stored)
            await _MultipartParser(_UploadFile(form, file, room, limits), boundary).read(request)
        yield form
    except OSError as error:
        raise StorageFailed("The server's storage for files is full or cannot be used.") from error
    finally:
        if not form.keep:
            file_store.quota.release(key, form.reserved_bytes)
            with suppress(StorageFailed):
                await asyncio.to_thread(file_store.discard_upload, form.path.name)


@dataclass(frozen=True, slots=True)
class _UploadFile:
    """Where a file goes, and how much of it. `reserve` takes so many bytes, if there are as many."""

    form: UploadedForm
    file: BinaryIO
    reserve: Callable[[int], bool]
    limits: BatchLimits

    def write(self, pieces: list[bytes]) -> None:
        """In a thread: write some of the file. Raises `RequestError` where there is no room for it."""
        size = sum(map(len, pieces))
        if not self.reserve(size):
            raise quota_error(self.limits.max_stored)
        self.form.reserved_bytes += size
        self.file.writelines(pieces)


class _MultipartParser:
    """Takes a body piece by piece: the parser's calls are noted, and carried out after each piece."""

    def __init__(self, target: _UploadFile, boundary: bytes) -> None:
        self._target = target
        self._form = target.form
        self._most = target.limits.max_upload
        self._parts = 0
        self._beside = 0
        self._whole = False
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None  # of the part that comes; None is the file
        self._pieces: list[bytes] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part,
                "on_header_field": self._on_field,
                "on_header_value": self._on_value,
                "on_header_end": self._on_header,
                "on_headers_finished": self._on_headers,
                "on_part_data": self._on_data,
                "on_end": self._on_end,
            },
        )

    async def read(self, request: Request) -> None:
        """All of it. Raises `RequestError`."""
        try:
            async for piece in request.stream():
                self._parser.write(piece)
                if self._pieces:
                    pieces, self._pieces = self._pieces, []
                    await asyncio.to_thread(self._target.write, pieces)
            self._parser.finalize()
        except FormParserError:
            raise RequestError(_NOT_ONE) from None
        if not self._whole:
            raise RequestError(_NOT_ONE)
        await asyncio.to_thread(_kept, self._target.file)

    # ---- what the parser says

    def _on_part(self) -> None:
        self._parts += 1
        self._headers = {}
        self._header = self._value = b""
        if self._parts > _MOST_PARTS:
            raise RequestError(f"The form has more than {_MOST_PARTS} parts.")

    def _on_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._count(end - start)

    def _on_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _on_header(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = _text(options.get(b"name", b""))
        self._name = None if b"filename" in options else name
        if self._name is None:
            if name != "file" or self._form.name is not None:
                raise RequestError("The form must have one file, and its name must be 'file'.", param="file")
            self._form.name = _text(options[b"filename"])[-_LONGEST_NAME:]
        elif name in self._form.fields:
            raise RequestError(f"The form has '{name[:64]}' twice.", param=name[:64])
        else:
            self._form.fields[name] = ""

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._form.size += end - start
            if self._form.size > self._most:
                raise _too_large(self._most)
            self._pieces.append(data[start:end])
            return
        self._count(end - start)
        self._form.fields[self._name] += data[start:end].decode("utf-8", "replace")
        if len(self._form.fields[self._name]) > _LONGEST_VALUE:
            raise RequestError(f"'{self._name[:64]}' is too long.", param=self._name[:64])

    def _on_end(self) -> None:
        self._whole = True

    def _count(self, size: int) -> None:
        self._beside += size
        if self._beside > _HEADS:
            raise RequestError(_NOT_ONE)


def _created(place: Path) -> BinaryIO:
    make_private(place)
    return place.open("r+b")


def _kept(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _too_large(most: int) -> RequestError:
    return RequestError(f"The file is larger than {most} bytes.", status=413)
