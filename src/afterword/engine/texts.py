"""Texts on their way to the tokenizer and back, kept until they are answered: a crash loses none."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass

from afterword.engine import frames

Ask = Callable[[frames.Tokenize], None]


@dataclass(slots=True, eq=False)
class _Text:
    """A text that somebody waits for. `crashes`: in how many it was the one at work."""

    message: frames.Tokenize
    since: float
    answer: asyncio.Future[tuple[int, ...]]
    crashes: int = 0


class Texts:
    """Owner of all texts that are not answered yet. `ask` tells the engine, if there is one."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._names = itertools.count()
        self._texts: dict[int, _Text] = {}

    def __len__(self) -> int:
        return len(self._texts)

    @property
    def suspected(self) -> bool:
        """Whether the text that is at work was so when an engine died."""
        return bool(self._texts) and next(iter(self._texts.values())).crashes > 0

    async def tokens(self, text: str, special: bool, now: float) -> tuple[int, ...]:
        """The tokens of a text."""
        message = frames.Tokenize(next(self._names), text, special)
        waiting = _Text(message, now, asyncio.get_running_loop().create_future())
        self._texts[message.call] = waiting
        self._ask(message)
        try:
            return await waiting.answer
        finally:
            self._texts.pop(message.call, None)

    def answered(self, message: frames.Tokens) -> None:
        """The engine has tokenized a text; perhaps nobody waits for it any more."""
        waiting = self._texts.pop(message.call, None)
        if waiting is not None and not waiting.answer.done():
            waiting.answer.set_result(message.ids)

    def ask_again(self) -> None:
        """There is another engine."""
        for waiting in self._texts.values():
            self._ask(waiting.message)

    def died(self, crashes: int, error: Exception) -> str | None:
        """The engine has died: the text that was at work in so many crashes, which is given up.

        They are tokenized one by one, so it can only be the first.
        """
        first = next(iter(self._texts.values()), None)
        if first is None:
            return None
        first.crashes += 1
        if first.crashes < crashes:
            return None
        _fail(first, error)
        return first.message.text

    def expire(self, accepted: float, error: Exception) -> None:
        """Give up what has waited since before that."""
        for waiting in self._texts.values():
            if waiting.since < accepted:
                _fail(waiting, error)

    def fail(self, error: Exception) -> None:
        """Give up all of them."""
        for waiting in self._texts.values():
            _fail(waiting, error)


def _fail(waiting: _Text, error: Exception) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)
