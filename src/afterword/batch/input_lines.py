"""Reads the lines of a batch's input file. Each line is a `BatchRequest` or an `InvalidLine` with an error message.

The functions read from a given file and have no state. They hold at most one line in memory.
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

_PIECE = 2**16  # bytes
_BATCH_FORM_KEYS = frozenset({"custom_id", "method", "url", "body"})
_BOM = b"\xef\xbb\xbf"
_SEEDS = 2**31  # seeds below this are accepted by every server


class InputLine(NamedTuple):
    """A line that is not blank. `number` counts from 1; `text` is None if the line is too long.

    `digest` is a hash of the number and the content.
    """

    number: int
    text: bytes | None
    digest: bytes


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """A valid line. `body` is the request; the seed of a request without one and all ids are derived from `digest`."""

    line: int
    custom_id: str
    body: dict[str, Any]
    digest: bytes

    @property
    def seed(self) -> int:
        """The seed that is sent if the request has none."""
        return int.from_bytes(self.digest[:8]) % _SEEDS

    @property
    def request_body(self) -> bytes:
        """The JSON that is sent to the server, always with a seed."""
        given = self.body if self.body.get("seed") is not None else self.body | {"seed": self.seed}
        return msgspec.json.encode(given)

    @property
    def sort_key(self) -> bytes:
        """Sorting by this key puts requests with a common prompt prefix next to each other."""
        return msgspec.json.encode(self.body.get("prompt"))


@dataclass(frozen=True, slots=True)
class InvalidLine:
    """A line that is not a request. `message` contains the number of the line."""

    line: int
    custom_id: str | None
    digest: bytes
    code: str
    message: str
    param: str | None = None


def read_lines(file: BinaryIO, max_line_bytes: int) -> Iterator[InputLine]:
    """Yield the lines of a file that are not blank. A line over `max_line_bytes` is hashed, but its text is dropped."""
    number = 0
    while first := file.readline(_PIECE):
        number += 1
        digest = hashlib.blake2b(f"{number} ".encode(), digest_size=16)
        text: bytearray | None = bytearray()
        piece = first.removeprefix(_BOM) if number == 1 else first
        while True:
            if text is not None:
                text += piece
                if len(text) > max_line_bytes + 2:  # CR LF
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
            yield InputLine(
                number, None if text is None or len(text) > max_line_bytes else bytes(text), digest.digest()
            )


def read_row(line: InputLine) -> BatchRequest | InvalidLine:
    """Parse a line: OpenAI's batch form, or the body of a request alone."""
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
        return _fault(line, None, "invalid_json_line", f"is not a JSON object, or has a duplicate key{reason}")
    if "body" not in value and not _BATCH_FORM_KEYS & value.keys():
        return _request(line, f"row-{line.number}", value)
    return _batch_form(line, value)


def _batch_form(line: InputLine, value: dict[str, Any]) -> BatchRequest | InvalidLine:
    name = value.get("custom_id")
    if not isinstance(name, str) or not 0 < len(name) <= MAX_CUSTOM_ID:
        problem = f"needs a 'custom_id', a string of 1 to {MAX_CUSTOM_ID} characters"
        return _fault(line, None, "invalid_custom_id", problem, "custom_id")
    for key in value:
        if key not in _BATCH_FORM_KEYS:
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
        return _fault(line, name, "stream_not_supported", "sets 'stream', which batches do not support", "body.stream")
    return BatchRequest(line.number, name, body, line.digest)


def duplicate_id_error(row: BatchRequest | InvalidLine) -> InvalidLine:
    """Make the error for a line with the `custom_id` of an earlier line."""
    message = f"Line {row.line} has the same 'custom_id' as an earlier line."
    return InvalidLine(row.line, row.custom_id, row.digest, "duplicate_custom_id", message, "custom_id")


def _fault(line: InputLine, name: str | None, code: str, problem: str, param: str | None = None) -> InvalidLine:
    return InvalidLine(line.number, name, line.digest, code, f"Line {line.number} {problem}.", param)
