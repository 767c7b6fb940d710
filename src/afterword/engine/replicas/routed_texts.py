"""Sends texts to the tokenizers of engine replicas, and again to another replica if one ends before it has answered."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from afterword.engine.messages import CancelTokenize, TextTokens
from afterword.engine.replicas import wire
from afterword.engine.replicas.connection import ReplicaConnection
from afterword.errors import EngineFailure, Overloaded

MAX_LOSSES = 2
"""A job or text that was at this many replicas when they ended, without progress in between, is not tried again."""


@dataclass(slots=True, eq=False)
class _RoutedText:
    """A text without an answer. `refused`: replicas that did not take it. `since`: its arrival."""

    message: wire.ReadText
    result: asyncio.Future[Sequence[int]]
    since: float
    connection: ReplicaConnection | None = None
    losses: int = 0
    refused: set[str] = field(default_factory=set)


class RoutedTexts:
    """Owns the texts. `usable` returns the replicas that can tokenize them, at present."""

    def __init__(self, usable: Callable[[], list[ReplicaConnection]]) -> None:
        self._usable = usable
        self._calls = itertools.count()
        self._texts: dict[int, _RoutedText] = {}

    def __len__(self) -> int:
        return len(self._texts)

    async def tokenize(self, text: str, special: bool, client: str, now: float) -> Sequence[int]:
        """Tokenize a text. It waits while there is no replica."""
        message = wire.ReadText(next(self._calls), text, special, client)
        routed = _RoutedText(message, asyncio.get_running_loop().create_future(), now)
        self._texts[message.call] = routed
        self._send(routed)
        try:
            return await routed.result
        finally:
            del self._texts[message.call]
            if routed.connection is not None:
                routed.connection.send(CancelTokenize(message.call))

    def handle(self, connection: ReplicaConnection, message: TextTokens | wire.TextFailed) -> None:
        """Handle a replica's answer."""
        routed = self._texts.get(message.call)
        if routed is None or routed.connection is not connection or routed.result.done():
            return
        routed.connection = None
        if isinstance(message, TextTokens):
            routed.result.set_result(message.ids)
            return
        error = wire.error_of(message.failure)
        routed.refused.add(connection.name)
        if not isinstance(error, Overloaded) or not self._send(routed):
            routed.result.set_exception(error)

    def handle_loss(self, connection: ReplicaConnection) -> None:
        """A replica has ended: its texts go to others."""
        for routed in [each for each in self._texts.values() if each.connection is connection]:
            routed.connection = None
            routed.losses += 1
            if routed.losses >= MAX_LOSSES and not routed.result.done():
                routed.result.set_exception(EngineFailure())
        self.send_waiting()

    def send_waiting(self) -> None:
        """Send the texts that no replica has."""
        for routed in self._texts.values():
            if routed.connection is None and not routed.result.done() and not self._send(routed):
                routed.refused.clear()  # they may have room by now
                self._send(routed)

    def expire(self, accepted: float, error: Exception) -> None:
        """Fail texts that arrived before the time `accepted`."""
        for routed in self._texts.values():
            if routed.since < accepted and not routed.result.done():
                routed.result.set_exception(error)

    def fail(self, error: Exception) -> None:
        """Fail all texts."""
        self.expire(float("inf"), error)

    def _send(self, routed: _RoutedText) -> bool:
        """Send a text to the replica that has the fewest. Returns False if every replica has refused it."""
        usable = self._usable()
        left = [each for each in usable if each.name not in routed.refused]
        if left:
            held = [each.connection for each in self._texts.values()]
            routed.connection = min(left, key=held.count)
            routed.connection.send(routed.message)
        return bool(left) or not usable
