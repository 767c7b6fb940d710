"""Parses JSON request bodies, and encodes JSON.

`parse_object` is strict: UTF-8, no NaN, no lone surrogates, limited depth, no key twice in an object, limited counts.

The parser holds the interpreter's lock during each call. So `parse_object` decodes a large body in pieces; called in a
worker thread, it lets other threads run between them. It counts arrays, objects and strings before it builds any.

`encode` escapes characters that end a line in Unicode but not in JSON, because many clients split streams there.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import msgspec

from afterword.errors import RequestError

T = TypeVar("T")
BAD_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The OpenAI API expects a JSON payload, but what was sent was not valid JSON.)"
)
LARGE_BODY = 2**16
"""Bytes. A body up to this size is parsed in one call, on the event loop."""
MAX_PARTS = 2**16
"""The most arrays and objects of a body together, and the most strings, including member names."""

_PIECE = 2**15  # bytes of an array of numbers that are decoded in one call
_MAX_NUMBER = 4096  # characters of a number in a large body; one of 8 MiB is read in one call of 0.3 s
_MAX_DEPTH = 8  # arrays and objects inside each other whose items are decoded one by one: each level copies its bytes
_MAX_DEEP = 2**20  # bytes of an item inside of so many; only schemas are so deep, and they are shorter
_SLICE = 2**14  # items of an array that are looked at in one call
_REST = 2  # after a piece that took t seconds the thread sleeps for 2 t seconds, so that other threads run
_THREAD = ThreadPoolExecutor(1, "parser")  # more threads would take the interpreter's lock from the event loop
_BOM = b"\xef\xbb\xbf"
_LONE_SURROGATE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|\xed[\xa0-\xbf]"
)
_PAIR = 12  # bytes of a surrogate pair as two escapes

_members_of = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items_of = msgspec.json.Decoder(list[msgspec.Raw]).decode

_LINE_ENDS = ((b"\xe2\x80\xa8", rb"\u2028"), (b"\xe2\x80\xa9", rb"\u2029"), (b"\xc2\x85", rb"\u0085"))

_encode = msgspec.json.Encoder().encode


def encode(value: object) -> bytes:
    """A value as JSON, with U+0085, U+2028 and U+2029 escaped."""
    data = _encode(value)
    if b"\xe2" not in data and b"\xc2" not in data:  # much faster than a search for two bytes
        return data
    return _escaped(data) if len(data) <= LARGE_BODY else b"".join(map(_escaped, _pieces(data)))


def _escaped(data: bytes) -> bytes:
    if b"\xe2\x80" in data or b"\xc2\x85" in data:
        for character, escape in _LINE_ENDS:
            data = data.replace(character, escape)
    return data


def _pieces(data: bytes) -> Iterator[bytes]:
    """UTF-8 data in pieces of whole characters, so that other threads run between them."""
    start = 0
    while start < len(data):
        end = min(start + LARGE_BODY, len(data))
        while end < len(data) and data[end] & 0xC0 == 0x80:
            end += 1
        yield data[start:end]
        start = end


async def run_in_thread_if_large(call: Callable[..., T], body: bytes, *more: Any) -> T:
    """Return `call(body, *more)`. It runs in the thread of this module if the body is larger than `LARGE_BODY`."""
    if len(body) <= LARGE_BODY:
        return call(body, *more)
    return await asyncio.get_running_loop().run_in_executor(_THREAD, partial(call, body, *more))


def parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. One byte order mark before it is skipped. Raises `RequestError`."""
    body = body.removeprefix(_BOM)
    try:
        value = msgspec.json.decode(body) if len(body) <= LARGE_BODY else _decoded_in_pieces(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise RequestError(_reason(body)) from None
    if not isinstance(value, dict):
        raise RequestError(BAD_JSON)
    if body.count(b":") != len(value) and _outside_strings(body).count(b":") != _count_members(value):
        raise RequestError("The JSON body has an object with the same key twice. Send each key once.")
    return value


def _reason(body: bytes) -> str:
    if _has_lone_surrogate(body.replace(rb"\\", b"")):
        return (
            "The JSON body has a lone surrogate: a code unit from U+D800 to U+DFFF without its pair, which is not a "
            "character. (HINT: do not cut strings inside a surrogate pair, or replace the cut character with U+FFFD.)"
        )
    return BAD_JSON


def _has_lone_surrogate(data: bytes) -> bool:
    """Search piece by piece: each search holds the interpreter's lock."""
    for start in range(0, len(data), _PIECE):
        found = _LONE_SURROGATE.search(data, start, start + _PIECE + _PAIR)
        if found is not None and found.start() < start + _PIECE:  # further behind, its pair may be cut off
            return True
    return False


def _decoded_in_pieces(body: bytes) -> dict[str, Any]:
    _check_parts(body)
    return {name: _value(bytes(raw)) for name, raw in _members_of(body).items()}


def _check_parts(body: bytes) -> None:
    """Raises `RequestError` if a body has too many strings, arrays or objects."""
    if not _more_than(MAX_PARTS, body, b"[{") and not _more_than(2 * MAX_PARTS, body, b'"'):
        return
    if _more_than(MAX_PARTS, _outside_strings(body), b"[{"):
        raise RequestError(f"The JSON body has more than {MAX_PARTS} arrays and objects. Send fewer prompts at a time.")


def _more_than(most: int, data: bytes, characters: bytes) -> bool:
    """Whether `data` has more than `most` of these characters. It counts piece by piece and stops when it has."""
    for start in range(0, len(data), _PIECE):
        most -= sum(data.count(character, start, start + _PIECE) for character in characters)
        if most < 0:
            return True
    return False


def _outside_strings(body: bytes) -> bytes:
    """The body without its strings. Raises `RequestError` if it has too many strings."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    if _more_than(2 * MAX_PARTS + 1, plain, b'"'):
        raise RequestError(
            f"The JSON body has more than {MAX_PARTS} strings, including member names. Send fewer prompts at a time."
        )
    return b"".join(plain.split(b'"')[::2])


def _value(raw: bytes, depth: int = 0) -> Any:
    """Decode a value that is well-formed outside its strings. Items of large arrays and objects are decoded one by one.

    Raises `RequestError` for a long number, and for a large value deep inside others.
    """
    if len(raw) <= LARGE_BODY or raw.startswith(b'"'):
        return msgspec.json.decode(raw)
    if not raw.startswith((b"[", b"{")):
        raise _long_number()
    if depth == _MAX_DEPTH:
        if len(raw) > _MAX_DEEP:
            raise RequestError(
                f"The JSON body has a value of more than {_MAX_DEEP} bytes inside {_MAX_DEPTH} arrays and objects."
            )
        return msgspec.json.decode(raw)
    if raw.startswith(b"{"):
        return {name: _value(bytes(item), depth + 1) for name, item in _members_of(raw).items()}
    if raw.find(b"[", 1) < 0 and b"{" not in raw and b'"' not in raw:
        return _numbers(raw)
    return [_value(bytes(item), depth + 1) for item in _items_of(raw)]


def _numbers(raw: bytes) -> list[Any]:
    """Decode an array whose values contain no comma, in pieces of about `_PIECE` bytes."""
    values: list[Any] = []
    start, end = 1, len(raw) - 1
    while start < end:
        began = time.perf_counter()
        cut = raw.find(b",", start + _PIECE, end)
        cut = end if cut < 0 else cut
        last = raw.rfind(b",", start, cut) + 1 or start
        if cut - last > _MAX_NUMBER and len(raw[last:cut].strip()) > _MAX_NUMBER:
            raise _long_number()
        values += msgspec.json.decode(b"[" + raw[start:cut] + b"]")
        start = cut + 1
        time.sleep(_REST * (time.perf_counter() - began))
    return values


def _long_number() -> RequestError:
    return RequestError(f"The JSON body has a number of more than {_MAX_NUMBER} characters.")


def _count_members(value: Any) -> int:
    """The number of members of all objects in a value."""
    if isinstance(value, dict):
        return len(value) + sum(map(_count_members, value.values()))
    count = 0
    for start in range(0, len(value) if isinstance(value, list) else 0, _SLICE):
        part = value[start : start + _SLICE]
        if not {dict, list}.isdisjoint(map(type, part)):
            count += sum(map(_count_members, part))
    return count
