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

from afterword.engine import frames
from afterword.engine.protocol import Card
from afterword.errors import RequestError

Ask = Callable[[frames.Tokenize | frames.Forget], None]

SHORT = 8192
"""Characters that a short text has at most."""
_AT_WORK = (8, 1)  # texts that the engine is sent at a time: short ones, long ones


@dataclass(slots=True, eq=False)
class _Text:
    """A text that a client waits for. `crashes`: how many engines have died while they worked on it."""

    message: frames.Tokenize
    client: str
    since: float
    answer: asyncio.Future[Sequence[int]]
    crashes: int = 0


@dataclass(slots=True)
class _Lane:
    """Short or long texts. `sent`: those that the engine has, in its order, and some of them no client's any more."""

    room: int
    sent: dict[int, _Text] = field(default_factory=dict)
    clients: dict[str, dict[int, _Text]] = field(default_factory=dict)

    def add(self, text: _Text) -> None:
        self.clients.setdefault(text.client, {})[text.message.call] = text

    def remove(self, text: _Text) -> None:
        own = self.clients.get(text.client, {})
        if own.pop(text.message.call, None) and not own:
            del self.clients[text.client]

    def take(self) -> _Text | None:
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


class Texts:
    """Owner of all texts that are not answered yet. `ask` tells the engine, between `ask_again` and `died`."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._names = itertools.count()
        self._texts: dict[int, _Text] = {}
        self._lanes = tuple(_Lane(room) for room in _AT_WORK)
        self._suspects: list[_Text] = []  # an engine died of one of them: each is tried alone
        self._living = False

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def at_work(self) -> tuple[int, ...]:
        """Characters of the short text and of the long one that the engine is working on; 0: of none."""
        return tuple(max(1, len(_first(lane).message.text)) if lane.sent else 0 for lane in self._lanes)

    @property
    def suspected(self) -> bool:
        """Whether there is a text that was at work when an engine died."""
        return bool(self._suspects) or any(text.crashes for lane in self._lanes for text in lane.sent.values())

    async def tokens(self, text: str, special: bool, now: float, client: str = "") -> Sequence[int]:
        """The tokens of a text."""
        message = frames.Tokenize(next(self._names), text, special, len(text) > SHORT)
        waiting = _Text(message, client, now, asyncio.get_running_loop().create_future())
        self._texts[message.call] = waiting
        self._lanes[message.long].add(waiting)
        self._feed()
        try:
            return await waiting.answer
        finally:
            self._leave(waiting)

    def answered(self, message: frames.Tokens) -> None:
        """The engine has tokenized a text, or has stopped since no client waits for it any more."""
        waiting = self._lanes[message.long].sent.pop(message.call, None)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_result(message.ids)
        self._feed()

    def ask_again(self) -> None:
        """There is another engine."""
        self._living = True
        self._feed()

    def died(self, crashes: int, error: Exception) -> str | None:
        """The engine has died: the text that was alone at work in so many crashes, which is given up.

        Of the short texts and of the long ones it works on one at a time, so it can only be the first of each.
        """
        self._living = False
        blamed = [_first(lane) for lane in self._lanes if lane.sent]
        returned = [text for lane in self._lanes for text in lane.sent.values()]
        for lane in self._lanes:
            lane.sent.clear()
        for text in blamed:
            text.crashes += 1
        culprit = blamed[0] if len(blamed) == 1 and blamed[0].crashes >= crashes else None
        if culprit is not None:
            _fail(culprit, error)
        for text in returned:
            if not text.answer.done():
                self._suspects.append(text) if text.crashes else self._lanes[text.message.long].add(text)
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
        for lane in self._lanes:
            lane.clients.clear()

    def _feed(self) -> None:
        """Send the engine what it may have: suspects alone, each when the one before is over."""
        while self._living and self._suspects and not any(self.at_work):
            self._send(self._suspects.pop(0))
        if self._living and not self.suspected:
            for lane in self._lanes:
                while len(lane.sent) < lane.room and (text := lane.take()):
                    self._send(text)

    def _send(self, text: _Text) -> None:
        self._lanes[text.message.long].sent[text.message.call] = text
        self._ask(text.message)

    def _leave(self, text: _Text) -> None:
        """It has been answered, or its client has left, and then the engine need not go on with it."""
        del self._texts[text.message.call]
        lane = self._lanes[text.message.long]
        if text in self._suspects:
            self._suspects.remove(text)
        elif text.message.call in lane.sent:
            self._ask(frames.Forget(text.message.call))
        else:
            lane.remove(text)
        self._feed()


def check_text(text: str, most: int, card: Card) -> None:
    """Refuse a text that the tokenizer would take too long for, or too much memory. Raises `RequestError`."""
    if len(text) > most:
        raise RequestError(
            f"The text has {len(text)} characters, and at most {most} are tokenized (the server's limit max_text).",
            param="prompt",
        )
    kind, longest = card.runs or ("", 0)
    if kind and any(len(match[0]) > longest for match in re.finditer(f"{kind}+", text)):
        raise RequestError(
            f"The text has more than {longest} characters of one kind in a row (as a regular expression: {kind}), "
            "which this model's tokenizer takes too long for.",
            param="prompt",
        )


def _first(lane: _Lane) -> _Text:
    return next(iter(lane.sent.values()))


def _fail(waiting: _Text, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
