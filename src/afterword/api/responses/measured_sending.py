"""Measures how long the sender of a response waits for its client, and how much the client has taken."""

from __future__ import annotations

from starlette.types import Message, Send

from afterword.completion.step_queue import Reader


def measured(send: Send, reader: Reader) -> Send:
    """`send`, which also tells `reader` about the response. Writing waits while the client leaves too much unread."""

    async def send_measured(message: Message) -> None:
        with reader.sending(len(message.get("body", b""))):
            await send(message)

    return send_measured
