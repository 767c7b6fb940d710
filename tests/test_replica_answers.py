"""Tests of the call to all replicas, with classes in place of Ray Serve's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from afterword.cli.ray_serve.replica_answers import replica_answers


@dataclass
class Result:
    """The answer of a replica: a text, an exception, or None for silence."""

    answer: str | Exception | None

    async def get_async(self) -> str:
        if self.answer is None:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        assert self.answer is not None
        return self.answer


@dataclass
class Handle:
    """A handle with these replicas; None: Serve does not say which there are."""

    results: Sequence[Result] | None
    asked: str = ""

    def broadcast(self, method: str) -> Handle:
        self.asked = method
        return self

    async def _fetch_replica_results_async(self) -> Sequence[Result]:
        if self.results is None:
            await asyncio.Event().wait()
        assert self.results is not None
        return self.results


def test_a_silent_or_failing_replica_hides_no_other() -> None:
    handle = Handle([Result("first"), Result(None), Result(RuntimeError("it has died")), Result("last")])
    assert asyncio.run(replica_answers(handle, "facts", 0.05)) == ["first", "last"]
    assert handle.asked == "facts"


def test_without_a_list_of_replicas_there_is_a_timeout() -> None:
    with pytest.raises(TimeoutError):
        asyncio.run(replica_answers(Handle(None), "facts", 0.05))
