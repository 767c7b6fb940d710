"""Tests of jobs and texts that a replica has refused, with engines that do what the test says, over TCP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from dataclasses import dataclass

import pytest
from test_routed_engine import INFO, Recorder, job, replicas, routed, run, until

from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.protocol import Job, Step
from afterword.errors import Overloaded


class ByName:
    """Chooses the first replica in the order of their names."""

    def choose(self, keys: Sequence[Hashable], loads: Mapping[str, int]) -> str:
        return min(loads)

    def forget(self, replica: str) -> None: ...


@dataclass
class Full(Recorder):
    """Refuses the first job and the first text."""

    refused_jobs: int = 0
    refused_texts: int = 0

    def start(self, wanted: Job) -> Recorder:
        if not self.refused_jobs:
            self.refused_jobs += 1
            raise Overloaded("Full.")
        return super().start(wanted)

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        if not self.refused_texts:
            self.refused_texts += 1
            raise Overloaded("Full.")
        return await super().tokenize(text, special, client)


@dataclass
class Silent(Recorder):
    """Never tokenizes a text."""

    async def tokenize(self, text: str, special: bool, client: str = "") -> Sequence[int]:
        self.calls.append("silent")
        await asyncio.Event().wait()
        return []


def test_work_that_one_replica_refused_returns_to_it_when_the_other_ends():
    async def test() -> None:
        async with replicas() as found:
            first, second = Full(INFO), Silent(INFO)
            await found.add("a", first)
            await found.add("b", second)
            async with routed(found, ByName()) as engine:
                await until(lambda: engine.load.sequences == 4)
                engine.start(job())
                text = asyncio.create_task(engine.tokenize("x", False))
                await until(lambda: len(second.prompts) == 1 and second.calls == ["silent"])
                assert (first.refused_jobs, first.refused_texts, first.prompts) == (1, 1, [])
                await found.kill("b")
                await until(lambda: len(first.prompts) == 1)
                assert tuple(await text) == (1,)

    run(test)


@dataclass
class Compiling(Recorder):
    """Begins to compile a job's grammar, and then has no room."""

    async def __aiter__(self) -> AsyncIterator[Step]:
        yield Step(compiling=True)
        raise Overloaded("Full.")


def test_a_job_that_another_replica_had_begun_is_not_blamed_for_the_end_of_one_that_had_not():
    async def test() -> None:
        async with replicas() as found:
            second, third = Recorder(INFO), Recorder(INFO)
            for name, each in (("a", Compiling(INFO)), ("b", second), ("c", third)):
                await found.add(name, each)
            async with routed(found, ByName()) as engine:
                await until(lambda: engine.load.sequences == 6)
                current = engine.start(job())
                await until(lambda: len(second.prompts) == 1)
                await found.kill("b")
                await until(lambda: len(third.prompts) == 1)
                assert current.crashes == 0

    run(test)


@dataclass
class Slow(Recorder):
    """Compiles for ever."""

    async def __aiter__(self) -> AsyncIterator[Step]:
        for compiling in (True, False, True):
            yield Step(compiling=compiling)
        await asyncio.Event().wait()


def test_a_job_whose_grammar_is_compiled_still_counts_as_waiting():
    async def test() -> None:
        async with replicas() as found:
            await found.add("a", Slow(INFO))
            async with routed(found, policy=QueuePolicy(queue_tokens=10)) as engine:
                first = engine.start(job(max_tokens=5))
                await until(lambda: first.begun)
                with pytest.raises(Overloaded):
                    engine.start(job(max_tokens=5))
                first.close()
                engine.start(job(max_tokens=5))

    run(test)
