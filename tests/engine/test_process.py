"""The lines to a process: what it said last is heard, however it ended."""

from __future__ import annotations

import asyncio
import sys

from afterword.engine import frames
from afterword.engine.process import spawn

LAST_WORDS = frames.Pulse(7, 0, 0, 0.0)
SPEAKS = f"""
import socket, sys
socket.socket(fileno=int(sys.argv[2])).sendall({frames.pack(LAST_WORDS)!r})
"""


def test_last_words_are_heard_though_nothing_can_be_sent_any_more():
    async def test() -> None:
        link = await spawn([sys.executable, "-c", SPEAKS])
        await asyncio.to_thread(link._process.wait)  # type: ignore[attr-defined]
        for run in range(3):  # the first is what shows that nobody listens
            link.send(frames.Close(run))
            await asyncio.sleep(0)
        assert await link.receive() == LAST_WORDS
        assert await link.receive() is None
        await link.bury()

    asyncio.run(test())
