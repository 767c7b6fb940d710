"""Receives a `multipart/form-data` body and writes its file to the disk, holding one piece of it in memory."""

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

# the client gets the errors about its body, so the parser's warnings need no log line
logging.getLogger("python_multipart").setLevel(logging.ERROR)
_MAX_PARTS, _MAX_VALUE_LENGTH, _MAX_NAME_LENGTH = 16, 1024, 256  # parts; characters
_MAX_OVERHEAD = 64 * 1024  # bytes of a body beside its file: headers of parts, and fields
_MALFORMED = "The body must be complete multipart/form-data, and the Content-Type header must name its boundary."


@dataclass(slots=True)
class UploadedForm:
    """The part of a form that has been received.

    `path`: the temporary file. `name`: the file name in the form, None before the file's part. `size`: bytes of the
    file. `reserved_bytes`: bytes taken from the storage quota of the API key. `keep`: the file store owns the file now,
    so `receive_upload` does not delete it.
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
    """Receive a form with one file named `file`. On exit, delete the file at `path` unless `keep` is set.

    Raises `RequestError` for a malformed form, or a file that is larger than the limits or the storage quota of `key`
    allow. Raises `StorageFailed`.
    """
    max_upload = limits.max_upload
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 70:
        raise RequestError(_MALFORMED)
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise RequestError("The body must not be compressed: send it without the header Content-Encoding.", status=415)
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > max_upload + _MAX_OVERHEAD:
        raise _too_large(max_upload)
    form = UploadedForm(await asyncio.to_thread(file_store.upload))
    try:
        with await asyncio.to_thread(_create, form.path) as file:
            reserve = partial(file_store.quota.reserve, key, limit=limits.max_stored)
            await _MultipartParser(_UploadFile(form, file, reserve, limits), boundary).read(request)
        yield form
    except OSError as error:
        raise StorageFailed("The server's disk for files is full or cannot be used.") from error
    finally:
        if not form.keep:
            file_store.quota.release(key, form.reserved_bytes)
            with suppress(StorageFailed):
                await asyncio.to_thread(file_store.discard_upload, form.path.name)


@dataclass(frozen=True, slots=True)
class _UploadFile:
    """The temporary file of an upload. `reserve` takes bytes from the storage quota; False: too few are left."""

    form: UploadedForm
    file: BinaryIO
    reserve: Callable[[int], bool]
    limits: BatchLimits

    def write(self, pieces: list[bytes]) -> None:
        """Write pieces of the file. Blocks: call it in a thread. Raises `RequestError` beyond the storage quota."""
        size = sum(map(len, pieces))
        if not self.reserve(size):
            raise quota_error(self.limits.max_stored)
        self.form.reserved_bytes += size
        self.file.writelines(pieces)


class _MultipartParser:
    """Parses a body piece by piece. The callbacks collect the file's bytes; `read` writes them after each piece."""

    def __init__(self, target: _UploadFile, boundary: bytes) -> None:
        self._target = target
        self._form = target.form
        self._max_upload = target.limits.max_upload
        self._parts = 0
        self._overhead = 0  # bytes of headers and fields
        self._complete = False
        self._header, self._value = b"", b""
        self._headers: dict[bytes, bytes] = {}
        self._name: str | None = None  # name of the current part; None for the file
        self._pieces: list[bytes] = []
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    async def read(self, request: Request) -> None:
        """Parse the whole body and flush its file to the disk. Raises `RequestError`."""
        try:
            async for piece in request.stream():
                self._parser.write(piece)
                if self._pieces:
                    pieces, self._pieces = self._pieces, []
                    await asyncio.to_thread(self._target.write, pieces)
            self._parser.finalize()
        except FormParserError:
            raise RequestError(_MALFORMED) from None
        if not self._complete:
            raise RequestError(_MALFORMED)
        await asyncio.to_thread(_flush, self._target.file)

    # ---- callbacks of `python_multipart`

    def _on_part_begin(self) -> None:
        self._parts += 1
        self._headers = {}
        self._header = self._value = b""
        if self._parts > _MAX_PARTS:
            raise RequestError(f"The form has more than {_MAX_PARTS} parts.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]
        self._count(end - start)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]
        self._count(end - start)

    def _on_header_end(self) -> None:
        self._headers[self._header.lower()] = self._value
        self._header = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = _text(options.get(b"name", b""))
        self._name = None if b"filename" in options else name
        if self._name is None:
            if name != "file" or self._form.name is not None:
                raise RequestError("The form must have exactly one file, in a field named 'file'.", param="file")
            self._form.name = _text(options[b"filename"])[-_MAX_NAME_LENGTH:]
        elif name in self._form.fields:
            raise RequestError(f"The form has the field '{name[:64]}' twice; each may appear once.", param=name[:64])
        else:
            self._form.fields[name] = ""

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name is None:
            self._form.size += end - start
            if self._form.size > self._max_upload:
                raise _too_large(self._max_upload)
            self._pieces.append(data[start:end])
            return
        self._count(end - start)
        self._form.fields[self._name] += data[start:end].decode("utf-8", "replace")
        if len(self._form.fields[self._name]) > _MAX_VALUE_LENGTH:
            raise RequestError(
                f"'{self._name[:64]}' must have at most {_MAX_VALUE_LENGTH} characters.", param=self._name[:64]
            )

    def _on_end(self) -> None:
        self._complete = True

    def _count(self, size: int) -> None:
        self._overhead += size
        if self._overhead > _MAX_OVERHEAD:
            raise RequestError(_MALFORMED)


def _create(path: Path) -> BinaryIO:
    make_private(path)
    return path.open("r+b")


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


def _too_large(max_bytes: int) -> RequestError:
    return RequestError(f"The file is larger than {max_bytes} bytes.", status=413)
