"""Lines of a batch, read one at a time: each is a request, or a fault that says what is wrong with which line.

Pure but for the file that it is given. Nothing here is larger than a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

import msgspec

from afterword.completion.json_body import BAD_JSON, parse_object
from afterword.errors import RequestError

ENDPOINT = "/v1/completions"
MAX_CUSTOM_ID = 512
"""Characters of a `custom_id`."""

_PIECE = 2**16
_WRAPPED = frozenset({"custom_id", "method", "url", "body"})
_BOM = b"\xef\xbb\xbf"
_SEEDS = 2**31  # small enough for every server


class InputLine(NamedTuple):
    """A line that is not blank. `text` is None if it is too long; `digest` depends on its number and what is in it."""

    number: int
    text: bytes | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A request. `digest` names it: its seed, if it has none, and all its ids come from there."""

    line: int
    custom_id: str
    body: dict[str, Any]
    digest: bytes

    @property
    def seed(self) -> int:
        """What the request is drawn from if it does not say."""
        return int.from_bytes(self.digest[:8]) % _SEEDS

    @property
    def request_body(self) -> bytes:
        """The body as it is sent."""
        given = self.body if self.body.get("seed") is not None else self.body | {"seed": self.seed}
        return msgspec.json.encode(given)

    @property
    def sort_key(self) -> bytes:
        """Rows whose prompts begin alike are neighbours in this order."""
        return msgspec.json.encode(self.body.get("prompt"))


@dataclass(frozen=True, slots=True)
class InvalidLine:
    """A line that is no request. `message` names the line."""

    line: int
    custom_id: str | None
    digest: bytes
    code: str
    message: str
    param: str | None = None


def read_lines(file: BinaryIO, longest: int) -> Iterator[InputLine]:
    """The lines of a file, numbered from 1. Blank ones are left out. Of one that is too long no more is kept."""
    number = 0
    while first := file.readline(_PIECE):
        number += 1
        digest = hashlib.blake2b(f"{number} ".encode(), digest_size=16)
        text: bytearray | None = bytearray()
        piece = first.removeprefix(_BOM) if number == 1 else first
        while True:
            if text is not None:
                text += piece
                if len(text) > longest + 2:  # with what ends the line
                    digest.update(text)
                    text = None
            else:
                digest.update(piece)
            if piece.endswith(b"\n") or not (piece := file.readline(_PIECE)):
                break
        if text is not None:
            text = text.strip()
            digest.update(text)
        if text is None or text:
            yield InputLine(number, None if text is None or len(text) > longest else bytes(text), digest.digest())


def read_row(line: InputLine) -> BatchRequest | InvalidLine:
    """What a line asks for: OpenAI's batch form, or the body of a request alone."""
    if line.text is None:
        return _fault(line, None, "line_too_long", "is too long")
    try:
        line.text.decode()
    except UnicodeDecodeError as error:
        return _fault(line, None, "invalid_utf8", f"is not UTF-8 (byte {error.start + 1})")
    try:
        value = parse_object(line.text)
    except RequestError as problem:
        reason = "" if problem.message == BAD_JSON else f": {problem.message.removesuffix('.')}"
        return _fault(line, None, "invalid_json_line", f"is not a JSON object, or has a key twice{reason}")
    if "body" not in value and not _WRAPPED & value.keys():
        return _request(line, f"row-{line.number}", value)
    return _wrapped(line, value)


def _wrapped(line: InputLine, value: dict[str, Any]) -> BatchRequest | InvalidLine:
    name = value.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID:
        what = f"needs a 'custom_id', a string of 1 to {MAX_CUSTOM_ID} characters"
        return _fault(line, None, "invalid_custom_id", what, "custom_id")
    for key in value:
        if key not in _WRAPPED:
            return _fault(line, name, "unknown_parameter", f"has an unknown member: {key[:64]}", key[:64])
    if value.get("method") != "POST":
        return _fault(line, name, "invalid_method", "needs the method 'POST'", "method")
    if value.get("url") != ENDPOINT:
        return _fault(line, name, "invalid_url", f"needs the url '{ENDPOINT}'", "url")
    if not isinstance(value.get("body"), dict):
        return _fault(line, name, "invalid_body", "needs a 'body', an object", "body")
    return _request(line, name, value["body"])


def _request(line: InputLine, name: str, body: dict[str, Any]) -> BatchRequest | InvalidLine:
    if body.get("stream"):
        return _fault(line, name, "stream_not_supported", "asks for a stream, which a batch has not", "body.stream")
    return BatchRequest(line.number, name, body, line.digest)


def duplicate_id_error(row: BatchRequest | InvalidLine) -> InvalidLine:
    """The same line as one whose `custom_id` an earlier one has."""
    message = f"Line {row.line} has a 'custom_id' that an earlier line has."
    return InvalidLine(row.line, row.custom_id, row.digest, "duplicate_custom_id", message, "custom_id")


def _fault(line: InputLine, name: str | None, code: str, what: str, param: str | None = None) -> InvalidLine:
    return InvalidLine(line.number, name, line.digest, code, f"Line {line.number} {what}.", param)
