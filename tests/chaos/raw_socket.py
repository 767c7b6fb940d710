"""Sends bytes on a socket and reads the response, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass

TIMEOUT = 15.0
"""Seconds within which a server must respond or close the connection, for any input."""
_STATUS = re.compile(rb"HTTP/1\.1 ([2-9]\d\d) ")
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Outcome:
    """`statuses` of all responses except 100; empty if the connection was closed. `hung`: the server did neither."""

    statuses: tuple[int, ...]
    hung: bool
    largest: int


async def send_bytes(port: int, data: bytes) -> Outcome:
    """Send bytes on a new connection, and wait for a response or the end of the connection."""
    received = bytearray()
    try:
        async with asyncio.timeout(TIMEOUT):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(data)
                while not _whole(received) and (part := await reader.read(2**16)):
                    received += part
            finally:
                writer.transport.abort()
    except TimeoutError:
        return Outcome(_statuses(received), True, len(received))
    except ConnectionError:
        pass
    return Outcome(_statuses(received), False, len(received))


def _statuses(received: bytes | bytearray) -> tuple[int, ...]:
    return tuple(int(status) for status in _STATUS.findall(received))


def _whole(received: bytearray) -> bool:
    """Whether a complete response has arrived, apart from a 100 Continue."""
    start = received.find(b"\r\n\r\n") + 4 if received.startswith(b"HTTP/1.1 100") else 0
    end = received.find(b"\r\n\r\n", start)
    if end < 0:
        return False
    length = _LENGTH.search(received, start, end + 2)
    return len(received) >= end + 4 + int(length[1]) if length else received.endswith(b"0\r\n\r\n")
