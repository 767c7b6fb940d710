"""Texts on their way to the tokenizer and back, kept until they are answered: a crash loses none.

The engine is sent only a few at a time, so that what waits is ordered here: short texts and long ones apart, clients
in turn, each client's shortest first.
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
"""Characters that a short text has at most."""
_MAX_IN_PROGRESS = (8, 1)  # texts that the engine is sent at a time: short ones, long ones


@dataclass(slots=True, eq=False)
class _PendingText:
    """A text that a client waits for. `crashes`: how many engines have died while they worked on it."""

    message: messages.TokenizeText
    client: str
    since: float
    answer: asyncio.Future[Sequence[int]]
    crashes: int = 0


@dataclass(slots=True)
class _TextQueue:
    """Short or long texts. `sent`: those that the engine has, in its order, and some of them no client's any more."""

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
        """The shortest text of the client whose turn it is."""
        client = next(iter(self.clients), None)
        if client is None:
            return None
        own = self.clients.pop(client)
        text = min(own.values(), key=lambda text: len(text.message.text))
        del own[text.message.call]
        if own:
            self.clients[client] = own  # behind the others
        return text


class TokenizerClient:
    """Owner of all texts that are not answered yet.

    `ask` tells the engine, between `resend` and `handle_worker_death`.
    """

    def __init__(self, ask: SendMessage) -> None:
        self._ask = ask
        self._names = itertools.count()
        self._texts: dict[int, _PendingText] = {}
        self._queues = tuple(_TextQueue(room) for room in _MAX_IN_PROGRESS)
        self._suspects: list[_PendingText] = []  # an engine died of one of them: each is tried alone
        self._worker_is_alive = False

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def sizes_in_progress(self) -> tuple[int, ...]:
        """Characters of the short text and of the long one that the engine is working on; 0: of none."""
        return tuple(max(1, len(_first(lane).message.text)) if lane.sent else 0 for lane in self._queues)

    @property
    def has_suspects(self) -> bool:
        """Whether there is a text that was at work when an engine died."""
        return bool(self._suspects) or any(text.crashes for lane in self._queues for text in lane.sent.values())

    async def tokenize(self, text: str, special: bool, now: float, client: str = "") -> Sequence[int]:
        """The tokens of a text."""
        message = messages.TokenizeText(next(self._names), text, special, len(text) > MAX_SHORT_TEXT)
        waiting = _PendingText(message, client, now, asyncio.get_running_loop().create_future())
        self._texts[message.call] = waiting
        self._queues[message.long].add(waiting)
        self._feed()
        try:
            return await waiting.answer
        finally:
            self._leave(waiting)

    def handle_tokens(self, message: messages.TextTokens) -> None:
        """The engine has tokenized a text, or has stopped since no client waits for it any more."""
        waiting = self._queues[message.long].sent.pop(message.call, None)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_result(message.ids)
        self._feed()

    def resend(self) -> None:
        """There is another engine."""
        self._worker_is_alive = True
        self._feed()

    def handle_worker_death(self, crashes: int, error: Exception) -> str | None:
        """The engine has died: the text that was alone at work in so many crashes, which is given up.

        Of the short texts and of the long ones it works on one at a time, so it can only be the first of each.
        """
        self._worker_is_alive = False
        blamed = [_first(lane) for lane in self._queues if lane.sent]
        returned = [text for lane in self._queues for text in lane.sent.values()]
        for lane in self._queues:
            lane.sent.clear()
        for text in blamed:
            text.crashes += 1
        culprit = blamed[0] if len(blamed) == 1 and blamed[0].crashes >= crashes else None
        if culprit is not None:
            _fail(culprit, error)
        for text in returned:
            if not text.answer.done():
                self._suspects.append(text) if text.crashes else self._queues[text.message.long].add(text)
        return culprit.message.text if culprit else None

    def expire(self, accepted: float, error: Exception) -> None:
        """Give up what has waited since before that."""
        for waiting in self._texts.values():
            if waiting.since < accepted:
                _fail(waiting, error)

    def fail(self, error: Exception) -> None:
        """Give up all of them. Those that the engine does not have are never sent to it."""
        for waiting in self._texts.values():
            _fail(waiting, error)
        self._suspects.clear()
        for lane in self._queues:
            lane.clients.clear()

    def _feed(self) -> None:
        """Send the engine what it may have: suspects alone, each when the one before is over."""
        while self._worker_is_alive and self._suspects and not any(self.sizes_in_progress):
            self._send(self._suspects.pop(0))
        if self._worker_is_alive and not self.has_suspects:
            for lane in self._queues:
                while len(lane.sent) < lane.max_in_progress and (text := lane.take()):
                    self._send(text)

    def _send(self, text: _PendingText) -> None:
        self._queues[text.message.long].sent[text.message.call] = text
        self._ask(text.message)

    def _leave(self, text: _PendingText) -> None:
        """It has been answered, or its client has left, and then the engine need not go on with it."""
        del self._texts[text.message.call]
        lane = self._queues[text.message.long]
        if text in self._suspects:
            self._suspects.remove(text)
        elif text.message.call in lane.sent:
            self._ask(messages.CancelTokenize(text.message.call))
        else:
            lane.remove(text)
        self._feed()


def check_text(text: str, most: int, model_info: ModelInfo) -> None:
    """Refuse a text that the tokenizer would take too long for, or too much memory. Raises `RequestError`."""
    if len(text) > most:
        raise RequestError(
            f"The text has {len(text)} characters, and at most {most} are tokenized (the server's limit max_text).",
            param="prompt",
        )
    kind, longest = model_info.slow_runs or ("", 0)
    if kind and any(len(match[0]) > longest for match in re.finditer(f"{kind}+", text)):
        raise RequestError(
            f"The text has more than {longest} characters of one kind in a row (as a regular expression: {kind}), "
            "which this model's tokenizer takes too long for.",
            param="prompt",
        )


def _first(lane: _TextQueue) -> _PendingText:
    return next(iter(lane.sent.values()))


def _fail(waiting: _PendingText, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
