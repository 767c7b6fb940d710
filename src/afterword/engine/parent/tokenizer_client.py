"""Sends texts to the worker's tokenizer and keeps each until its tokens arrive, so that a worker crash loses none.

The worker receives only a few texts at a time; the others wait here. Short and long texts have separate queues. Each
queue serves clients in turn, and each client's shortest text first. The event loop's thread owns all state.
"""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from afterword.engine import messages
from afterword.engine.protocol import ModelInfo
from afterword.errors import RequestError

SendMessage = Callable[[messages.TokenizeText | messages.CancelTokenize], None]

MAX_SHORT_TEXT = 8192
"""The most characters of a short text."""
_MAX_IN_PROGRESS = (8, 1)  # texts that the worker may hold at a time: short, long


@dataclass(slots=True, eq=False)
class _PendingText:
    """A text that a client waits for.

    `crashes`: how many workers died while they tokenized it. `since`: its arrival in seconds of the caller's clock.
    """

    message: messages.TokenizeText
    client: str
    since: float
    result: asyncio.Future[Sequence[int]]
    crashes: int = 0


@dataclass(slots=True)
class _TextQueue:
    """The queue of short or of long texts.

    `sent`: the texts that the worker holds, in its order; the clients of some may have disconnected. `clients`: the
    pending texts by client, the next client first.
    """

    max_in_progress: int
    sent: dict[int, _PendingText] = field(default_factory=dict)
    clients: dict[str, dict[int, _PendingText]] = field(default_factory=dict)

    def add(self, text: _PendingText) -> None:
        self.clients.setdefault(text.client, {})[text.message.call] = text

    def remove(self, text: _PendingText) -> None:
        own = self.clients.get(text.client, {})
        if own.pop(text.message.call, None) and not own:
            del self.clients[text.client]

    def take(self) -> _PendingText | None:
        """Remove and return the shortest text of the next client; None if no text waits."""
        client = next(iter(self.clients), None)
        if client is None:
            return None
        own = self.clients.pop(client)
        text = min(own.values(), key=lambda text: len(text.message.text))
        del own[text.message.call]
        if own:
            self.clients[client] = own  # at the end: the other clients come first
        return text


class TokenizerClient:
    """Owns all texts without an answer.

    `send_message` sends a message to the worker. It is called only between `resend` and `handle_worker_death`.
    """

    def __init__(self, send_message: SendMessage) -> None:
        self._send_message = send_message
        self._names = itertools.count()
        self._texts: dict[int, _PendingText] = {}
        self._queues = tuple(_TextQueue(max_characters) for max_characters in _MAX_IN_PROGRESS)
        self._suspects: list[_PendingText] = []  # one of them crashed the worker: each is sent alone
        self._worker_is_alive = False

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def sizes_in_progress(self) -> tuple[int, ...]:
        """Characters of the short and of the long text that the worker is tokenizing, 0 for none."""
        return tuple(max(1, len(_first(queue).message.text)) if queue.sent else 0 for queue in self._queues)

    @property
    def has_suspects(self) -> bool:
        """Whether a text is open that was being tokenized when a worker died."""
        return bool(self._suspects) or any(text.crashes for queue in self._queues for text in queue.sent.values())

    async def tokenize(self, text: str, special: bool, now: float, client: str = "") -> Sequence[int]:
        """Tokenize a text. `now`: the time of the caller's clock in seconds, see `expire`."""
        message = messages.TokenizeText(next(self._names), text, special, len(text) > MAX_SHORT_TEXT)
        pending = _PendingText(message, client, now, asyncio.get_running_loop().create_future())
        self._texts[message.call] = pending
        self._queues[message.long].add(pending)
        self._send_next()
        try:
            return await pending.result
        finally:
            self._remove(pending)

    def handle_tokens(self, message: messages.TextTokens) -> None:
        """Handle the worker's answer for a text. The tokens are incomplete if the text was cancelled."""
        pending = self._queues[message.long].sent.pop(message.call, None)
        if pending is not None and not pending.result.done():
            pending.result.set_result(message.ids)
        self._send_next()

    def resend(self) -> None:
        """Send texts to a new worker."""
        self._worker_is_alive = True
        self._send_next()

    def handle_worker_death(self, crashes: int, error: Exception) -> str | None:
        """Return the text that crashed the worker, if it was the only suspect of its `crashes`-th crash; it fails.

        The worker tokenizes one short and one long text at a time, so only the first text of each queue is a suspect.
        """
        self._worker_is_alive = False
        blamed = [_first(queue) for queue in self._queues if queue.sent]
        returned = [text for queue in self._queues for text in queue.sent.values()]
        for queue in self._queues:
            queue.sent.clear()
        for text in blamed:
            text.crashes += 1
        culprit = blamed[0] if len(blamed) == 1 and blamed[0].crashes >= crashes else None
        if culprit is not None:
            _fail(culprit, error)
        for text in returned:
            if not text.result.done():
                self._suspects.append(text) if text.crashes else self._queues[text.message.long].add(text)
        return culprit.message.text if culprit else None

    def expire(self, accepted: float, error: Exception) -> None:
        """Fail the texts that arrived before the time `accepted`."""
        for pending in self._texts.values():
            if pending.since < accepted:
                _fail(pending, error)

    def fail(self, error: Exception) -> None:
        """Fail all texts. Those that the worker does not hold are never sent to it."""
        for pending in self._texts.values():
            _fail(pending, error)
        self._suspects.clear()
        for queue in self._queues:
            queue.clients.clear()

    def _send_next(self) -> None:
        """Send texts to the worker while its limits allow it. Suspects are sent alone, one after the other."""
        while self._worker_is_alive and self._suspects and not any(self.sizes_in_progress):
            self._send(self._suspects.pop(0))
        if self._worker_is_alive and not self.has_suspects:
            for queue in self._queues:
                while len(queue.sent) < queue.max_in_progress and (text := queue.take()):
                    self._send(text)

    def _send(self, text: _PendingText) -> None:
        self._queues[text.message.long].sent[text.message.call] = text
        self._send_message(text.message)

    def _remove(self, text: _PendingText) -> None:
        """Remove a text that was answered or cancelled, and cancel it in the worker if the worker holds it."""
        del self._texts[text.message.call]
        queue = self._queues[text.message.long]
        if text in self._suspects:
            self._suspects.remove(text)
        elif text.message.call in queue.sent:
            self._send_message(messages.CancelTokenize(text.message.call))
        else:
            queue.remove(text)
        self._send_next()


def check_text(text: str, max_characters: int, model_info: ModelInfo) -> None:
    """Raise `RequestError` for a text that would take the tokenizer too much time or memory.

    `max_characters`: the limit `max_text` in characters.
    """
    if len(text) > max_characters:
        raise RequestError(
            f"The text has {len(text)} characters, but at most {max_characters} are tokenized "
            "(the server's limit max_text).",
            param="prompt",
        )
    kind, longest = model_info.slow_runs or ("", 0)
    if kind and any(len(match[0]) > longest for match in re.finditer(f"{kind}+", text)):
        raise RequestError(
            f"The text has more than {longest} consecutive characters that match the regular expression {kind}. "
            "This model's tokenizer would take too long for them. Shorten the run or split the text.",
            param="prompt",
        )


def _first(queue: _TextQueue) -> _PendingText:
    return next(iter(queue.sent.values()))


def _fail(pending: _PendingText, error: Exception) -> None:
    if not pending.result.done():
        pending.result.set_exception(error)
