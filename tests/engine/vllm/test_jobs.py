"""Tests of the jobs of the worker with vLLM, with a library in its place that is read, and with one that calls back."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import msgspec
import pytest

from afterword.engine import messages
from afterword.engine.protocol import Job, Load, Sampling, Step, Token
from afterword.engine.vllm.jobs import (
    SCORES_PER_STEP,
    SampleLate,
    SampleLost,
    SampleSink,
    VllmJobs,
    joined,
    read_into,
)
from afterword.engine.vllm.requests import PromptScore, SampleOutput, SampleRequest

JOB = Job(prompt=(3, 4), samples=1, max_tokens=3, sampling=Sampling(), end_tokens=(7,), key=bytes(16))


class Library:
    """Gives the outputs of the test until the test or the job ends. `begun`, `closed`: names of requests, in order."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.closed: list[str] = []
        self.requests: dict[str, SampleRequest] = {}
        self.outputs: dict[str, Any] = defaultdict(asyncio.Queue)

    async def generate(self, request: SampleRequest, sink: SampleSink) -> None:
        await read_into(sink, self.generated(request))

    async def generated(self, request: SampleRequest) -> AsyncGenerator[SampleOutput]:
        self.begun.append(request.name)
        self.requests[request.name] = request
        try:
            while (output := await self.outputs[request.name].get()) is not None:
                if isinstance(output, Exception):
                    raise output
                yield output
        finally:
            self.closed.append(request.name)


class CallingLibrary(Library):
    """Gives its outputs to the sink when they arrive, whether the job is paused or not, as vLLM does."""

    async def generate(self, request: SampleRequest, sink: SampleSink) -> None:
        self.begun.append(request.name)
        self.requests[request.name] = request
        self.outputs[request.name] = calls = Calls(sink)
        try:
            await calls.ended
        finally:
            self.closed.append(request.name)


class Calls:
    """In place of the queue of a request."""

    def __init__(self, sink: SampleSink) -> None:
        self.sink = sink
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put_nowait(self, output: SampleOutput | Exception | None) -> None:
        if self.ended.done():
            return
        if isinstance(output, Exception):
            self.ended.set_exception(output)
        elif (output is None or not self.sink.take(output)) and not self.ended.done():  # the job can have cancelled it
            self.ended.set_result(None)


class Bench:
    """Jobs with one of the libraries above, and all steps that were sent, by job id."""

    def __init__(self, sequences: int, library: Library) -> None:
        self.library = library
        self.steps: dict[int, list[Step]] = defaultdict(list)
        self.load = Load()
        self.jobs = VllmJobs(self.library.generate, self.receive, sequences, 10)

    def receive(self, steps: dict[int, Step], load: Load) -> None:
        self.load = load
        for job_id, step in steps.items():
            self.steps[job_id].append(step)

    async def settle(self) -> None:
        for _ in range(20):
            await asyncio.sleep(0)

    async def start(self, job_id: int = 1, **changes: Any) -> None:
        self.jobs.apply(messages.StartJob(job_id, msgspec.structs.replace(JOB, **changes)))
        await self.settle()

    async def apply(self, message: messages.JobMessage) -> None:
        self.jobs.apply(message)
        await self.settle()

    async def put(self, name: str, *ids: int, **output: Any) -> None:
        self.library.outputs[name].put_nowait(SampleOutput(ids, **output))
        await self.settle()

    def whole(self, job_id: int = 1) -> Step:
        """All steps of a job as one."""
        (step,) = joined(self.steps[job_id])
        return step


def run(test: Callable[[Bench], Coroutine[Any, Any, None]], sequences: int = 4) -> None:
    """Run a test with each library."""

    async def main(kind: type[Library]) -> None:
        await test(Bench(sequences, kind()))

    for kind in (Library, CallingLibrary):
        asyncio.run(main(kind))


def test_a_job_is_announced_and_ends_by_its_length():
    async def test(bench: Bench) -> None:
        await bench.start()
        assert bench.steps[1] == [Step()], "the supervisor must know what is computed"
        await bench.put("1-0", 5, cached=1)
        await bench.put("1-0", 5, 6)
        assert bench.whole() == Step(
            sampled=((0, Token(5)), (0, Token(5)), (0, Token(6))), ended=((0, "length"),), cached=1
        )
        assert bench.library.closed == ["1-0"]
        assert bench.load == Load(4, 0, 0)

    run(test)


def test_an_end_token_ends_a_sample_even_as_the_last_one():
    async def test(bench: Bench) -> None:
        await bench.start(max_tokens=1)
        await bench.put("1-0", 7)
        assert bench.whole().ended == ((0, "stop"),)

    run(test)


def test_the_other_samples_follow_the_first_output_of_the_first():
    async def test(bench: Bench) -> None:
        await bench.start(samples=3, prompt_alternatives=0)
        assert bench.library.begun == ["1-0"]
        assert bench.load == Load(4, 1, 2)
        await bench.put("1-0", 5, scores=(PromptScore(4, 1, ((4, -1.0),)),))
        assert bench.library.begun == ["1-0", "1-1", "1-2"]
        assert bench.whole().scored == (Token(4, -1.0, (), 1),)
        assert bench.load == Load(4, 3, 0)

    run(test)


def test_outputs_that_arrive_together_are_one_step():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2)
        await bench.put("1-0", 5)
        before = len(bench.steps[1])
        for name in ("1-0", "1-1"):
            bench.library.outputs[name].put_nowait(SampleOutput((6,)))
        await bench.settle()
        assert bench.steps[1][before:] == [Step(sampled=((0, Token(6)), (1, Token(6))))]

    run(test)


def test_a_dropped_sample_is_aborted_and_the_others_go_on():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2)
        await bench.put("1-0", 5)
        await bench.apply(messages.DropSample(1, 0))
        assert bench.library.closed == ["1-0"]
        await bench.put("1-1", 5, 5, 5)
        assert bench.whole().ended == ((1, "length"),)
        assert bench.load == Load(4, 0, 0)

    run(test)


def test_the_waiting_samples_of_a_job_with_a_dropped_sample_keep_their_place():
    async def test(bench: Bench) -> None:
        await bench.start(1, samples=3)
        await bench.put("1-0", 5)
        await bench.start(2)
        await bench.apply(messages.DropSample(1, 1))
        await bench.put("1-0", 5, 5)
        await bench.put("1-2", 5, 5, 5)
        await bench.put("2-0", 5, 5, 5)
        assert bench.library.begun == ["1-0", "1-2", "2-0"]

    run(test, sequences=1)


def test_the_first_sample_is_computed_until_the_others_can_start():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2)
        await bench.apply(messages.DropSample(1, 0))
        assert bench.library.closed == []
        await bench.put("1-0", 5)
        assert bench.library.closed == ["1-0"]
        assert bench.library.begun == ["1-0", "1-1"]
        assert bench.whole().sampled == ()

    run(test)


def test_a_closed_job_is_aborted():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2)
        await bench.put("1-0", 5)
        await bench.apply(messages.CloseJob(1))
        assert sorted(bench.library.closed) == ["1-0", "1-1"]
        assert bench.load == Load(4, 0, 0)
        await bench.apply(messages.CloseJob(1))  # an unknown job is ignored

    run(test)


def test_a_job_that_is_closed_before_its_request_begins_frees_its_place():
    async def test(bench: Bench) -> None:
        bench.jobs.apply(messages.StartJob(1, JOB))
        bench.jobs.apply(messages.CloseJob(1))
        await bench.settle()
        assert bench.library.begun == []
        await bench.start(2)
        assert bench.library.begun == ["2-0"]

    run(test, sequences=1)


def test_a_job_without_tokens_ends_with_the_scores():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2, max_tokens=0, prompt_alternatives=0)
        await bench.put("1-0", 5, scores=(PromptScore(4, 1, ((4, -1.0),)),))
        assert bench.whole() == Step(scored=(Token(4, -1.0, (), 1),), ended=((0, "length"), (1, "length")))
        assert bench.library.begun == ["1-0"]

    run(test)


def test_a_refused_request_fails_its_job_alone():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2)
        await bench.start(2)
        await bench.put("1-0", 5)
        bench.library.outputs["1-1"].put_nowait(ValueError("no"))
        await bench.settle()
        assert bench.whole().refused
        assert sorted(bench.library.closed) == ["1-0", "1-1"]
        await bench.put("2-0", 5, 5, 5)
        assert bench.whole(2).ended == ((0, "length"),)

    run(test)


@pytest.mark.parametrize(("problem", "step"), [(SampleLost("no"), Step(lost=True)), (SampleLate(), Step(late=True))])
def test_a_lost_request_fails_its_job(problem, step):
    async def test(bench: Bench) -> None:
        await bench.start()
        bench.library.outputs["1-0"].put_nowait(problem)
        await bench.settle()
        assert bench.whole() == step
        assert bench.load == Load(4, 0, 0)

    run(test)


def test_a_request_that_ends_early_is_no_shorter_text():
    async def test(bench: Bench) -> None:
        await bench.start()
        await bench.put("1-0", 5)
        bench.library.outputs["1-0"].put_nowait(None)
        await bench.settle()
        assert bench.whole().refused
        assert not bench.whole().ended

    run(test)


def test_a_log_probability_that_is_no_number_fails_the_job():
    async def test(bench: Bench) -> None:
        await bench.start(alternatives=0)
        await bench.put("1-0", 5, alternatives=(((5, float("nan")),),))
        assert bench.whole().failed
        assert bench.library.closed == ["1-0"]

    run(test)


def test_a_paused_job_sends_nothing_until_it_is_resumed():
    async def test(bench: Bench) -> None:
        await bench.start(samples=2)
        await bench.put("1-0", 5)
        await bench.apply(messages.PauseJob(1))
        before = len(bench.steps[1])
        await bench.put("1-0", 6)
        await bench.put("1-1", 6)
        assert len(bench.steps[1]) == before
        await bench.apply(messages.ResumeJob(1))
        assert {pair for step in bench.steps[1][before:] for pair in step.sampled} == {(0, Token(6)), (1, Token(6))}

    run(test)


def test_a_request_that_ends_during_a_pause_ends_its_job_when_it_is_resumed():
    async def test(bench: Bench) -> None:
        await bench.start()
        await bench.apply(messages.PauseJob(1))
        await bench.put("1-0", 5)
        await bench.put("1-0", 6, 7)
        bench.library.outputs["1-0"].put_nowait(None)
        await bench.settle()
        assert bench.steps[1] == [Step()]
        await bench.apply(messages.ResumeJob(1))
        assert bench.whole() == Step(
            sampled=((0, Token(5)), (0, Token(6)), (0, Token(7))), ended=((0, "stop"),), cached=0
        )
        assert bench.load == Load(4, 0, 0)

    run(test)


def test_a_request_that_ends_early_during_a_pause_is_refused_after_its_tokens():
    async def test(bench: Bench) -> None:
        await bench.start()
        await bench.apply(messages.PauseJob(1))
        await bench.put("1-0", 5)
        bench.library.outputs["1-0"].put_nowait(None)
        await bench.settle()
        await bench.apply(messages.ResumeJob(1))
        assert bench.whole() == Step(sampled=((0, Token(5)),), refused=True)

    run(test)


def test_an_output_without_meaning_that_came_during_a_pause_refuses_the_job():
    async def test(bench: Bench) -> None:
        await bench.start(alternatives=1)
        await bench.apply(messages.PauseJob(1))
        await bench.put("1-0", 5, alternatives=())
        await bench.apply(messages.ResumeJob(1))
        assert bench.whole().refused
        assert bench.library.closed == ["1-0"]
        assert bench.load == Load(4, 0, 0)

    run(test)


def test_waiting_samples_of_a_paused_job_leave_their_turn_to_others():
    async def test(bench: Bench) -> None:
        await bench.start(1)
        await bench.start(2)
        await bench.apply(messages.PauseJob(2))
        await bench.start(3)
        await bench.put("1-0", 5, 5, 5)
        assert bench.library.begun == ["1-0", "3-0"]
        await bench.put("3-0", 5, 5, 5)
        await bench.apply(messages.ResumeJob(2))
        assert bench.library.begun == ["1-0", "3-0", "2-0"]

    run(test, sequences=1)


def test_many_scores_are_sent_in_parts_before_the_first_token():
    scores = tuple(Token(4) for _ in range(2 * SCORES_PER_STEP + 1))
    parts = joined([Step(scored=scores, cached=3), Step(sampled=((0, Token(5)),))])
    assert [len(part.scored) for part in parts] == [SCORES_PER_STEP, SCORES_PER_STEP, 1]
    assert [bool(part.sampled) for part in parts] == [False, False, True]
    assert sum(part.cached for part in parts) == 3
