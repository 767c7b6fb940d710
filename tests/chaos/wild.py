"""Bytes on a socket, and what came back: for requests that no client library would send."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

PATIENCE = 15.0
"""Seconds within which a server must answer or close, for any input."""
_STATUS = re.compile(rb"HTTP/1\.1 ([2-9]\d\d) ")
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`statuses` of all answers (to go on is none); none if the connection was just closed. `hung`: neither came."""

    statuses: tuple[int, ...]
    hung: bool
    largest: int


async def shout(port: int, data: bytes) -> Outcome:
    """Send bytes on a connection of their own, and wait for an answer or the end."""
    told = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                while not _whole(told) and (part := await reader.read(2**16)):
                    told += part
            finally:
                writer.transport.abort()
    except TimeoutError:
        return Outcome(_statuses(told), True, len(told))
    except ConnectionError:
        pass
    return Outcome(_statuses(told), False, len(told))


def _statuses(told: bytes | bytearray) -> tuple[int, ...]:
    return tuple(int(status) for status in _STATUS.findall(told))


def _whole(told: bytearray) -> bool:
    """Whether a whole answer is there, and not only that to go on."""
    start = told.find(b"\r\n\r\n") + 4 if told.startswith(b"HTTP/1.1 100") else 0
    end = told.find(b"\r\n\r\n", start)
    if end < 0:
        return False
    length = _LENGTH.search(told, start, end + 2)
    return len(told) >= end + 4 + int(length[1]) if length else told.endswith(b"0\r\n\r\n")
