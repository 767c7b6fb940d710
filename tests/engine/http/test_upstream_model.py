"""Tests of samples on an upstream: streams, scores, failures before and after the first token, and cancellation."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from scripted_upstream import (
    BEGIN,
    END,
    GENERATE,
    VOCABULARY,
    Exchange,
    ScriptedUpstream,
    clamps,
    dies,
    error_event,
    greedy,
    logprobs,
    sends,
    silent,
    status,
    upstream_here,
)

from afterword.engine.http import model as model_module
from afterword.engine.http import upstream as upstream_module
from afterword.engine.http.failures import Broken, Malformed
from afterword.engine.http.identity import find_identity
from afterword.engine.http.model import MOST_BROKEN, SampleRefused, UpstreamModel
from afterword.engine.http.upstream import Upstream
from afterword.engine.messages import LoadUpstream
from afterword.engine.protocol import Job, ModelInfo, Sampling
from afterword.engine.vllm.jobs import SampleLate, SampleLost
from afterword.engine.vllm.requests import SampleOutput, sample_request

PROMPT = (BEGIN, *b"The cat")
JOB = Job(prompt=PROMPT, samples=1, max_tokens=4, sampling=Sampling(temperature=0.0), end_tokens=(END,), key=bytes(16))
EXPECTED = greedy(list(PROMPT), 4)
INFO = ModelInfo(0, 511, 4, (b"a",) * VOCABULARY, (END,), None, None, False, False, 1, None, "fp")
SILENCE = 1.0
pytestmark = pytest.mark.timeout(60)


class Bench:
    """An upstream and a model on it."""

    def __init__(self, upstream: ScriptedUpstream, client: Upstream, model: UpstreamModel) -> None:
        self.upstream = upstream
        self.client = client
        self.model = model

    def generate(self, **changes: Any) -> AsyncGenerator[SampleOutput]:
        request = sample_request(1, msgspec.structs.replace(JOB, **changes), 0, VOCABULARY)
        return self.model.generate(request)

    async def outputs(self, **changes: Any) -> list[SampleOutput]:
        async with aclosing(self.generate(**changes)) as outputs:
            return [output async for output in outputs]

    async def ids(self, **changes: Any) -> list[int]:
        return [token for output in await self.outputs(**changes) for token in output.ids]


def run(
    test: Callable[[Bench], Coroutine[Any, Any, None]],
    patience: float = 30.0,
    key: str = "",
    verbose: bool = False,
    silence: float = SILENCE,
) -> None:
    async def main() -> None:
        async with upstream_here() as upstream:
            client = Upstream(upstream.url, key, 8, silence)
            identity = await find_identity(client, "toy")
            settings = LoadUpstream("", upstream.url, 4, 20, silence, patience, verbose=verbose)
            model = UpstreamModel(client, identity, INFO, None, settings)  # type: ignore[arg-type]
            try:
                await test(Bench(upstream, client, model))
            finally:
                await model.close()

    asyncio.run(main())


def test_a_sample_is_streamed():
    async def test(bench: Bench) -> None:
        outputs = await bench.outputs()
        assert [output.ids for output in outputs] == [(token,) for token in EXPECTED]
        (sent,) = bench.upstream.requests
        assert (sent["model"], sent["token_ids"], sent["stream"]) == ("toy", list(PROMPT), True)

    run(test)


def test_the_connection_is_used_again():
    async def test(bench: Bench) -> None:
        for _ in range(5):
            assert await bench.ids() == EXPECTED
        assert bench.upstream.connections == 1
        assert bench.upstream.left == 0

    run(test)


def test_the_key_is_sent():
    async def test(bench: Bench) -> None:
        await bench.ids()
        assert {each.get("authorization") for each in bench.upstream.headers} == {"Bearer secret"}

    run(test, key="secret")


def test_log_probabilities_come_with_each_token():
    async def test(bench: Bench) -> None:
        outputs = await bench.outputs(alternatives=2)
        row = logprobs(list(PROMPT))
        (alternatives,) = outputs[0].alternatives or ()
        assert dict(alternatives)[EXPECTED[0]] == pytest.approx(row[EXPECTED[0]])
        assert len(dict(alternatives)) == 3

    run(test)


def test_a_prompt_that_is_only_scored_is_one_request():
    async def test(bench: Bench) -> None:
        (output,) = await bench.outputs(prompt_alternatives=1, max_tokens=0)
        assert [score.id for score in output.scores] == list(PROMPT[1:])
        (sent,) = bench.upstream.requests
        assert sent["stream"] is False

    run(test)


def test_scores_come_with_the_first_token_of_the_stream_after_them():
    async def test(bench: Bench) -> None:
        outputs = await bench.outputs(prompt_alternatives=1)
        assert [len(output.scores) for output in outputs] == [len(PROMPT) - 1, 0, 0, 0]
        assert [output.ids[0] for output in outputs] == EXPECTED
        assert [each["stream"] for each in bench.upstream.requests] == [False, True]

    run(test)


# ---- failures


BEFORE = {
    "no response": dies(-1),
    "no token": dies(0),
    "500": status(500),
    "502": status(502),
    "503": status(503),
    "429": status(429),
    "an error event": error_event(500),
    "an early end": sends(),
    "nothing": silent(0),
    "an aborted sample": sends(b'data: {"choices": [{"index": 0, "token_ids": [], "finish_reason": "abort"}]}\n\n'),
}


@pytest.mark.parametrize("failure", BEFORE)
def test_a_request_that_has_brought_nothing_is_sent_again(failure):
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(BEFORE[failure])
        assert await bench.ids() == EXPECTED
        assert len(bench.upstream.requests) == 2

    run(test)


@pytest.mark.parametrize("failure", [status(500), dies(-1)])
def test_scores_that_fail_are_requested_again(failure):
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(failure)
        outputs = await bench.outputs(prompt_alternatives=0)
        assert len(outputs[0].scores) == len(PROMPT) - 1

    run(test)


def test_scores_are_not_sent_before_the_stream_has_begun():
    """So a failure between the two requests is one before the first token."""

    async def test(bench: Bench) -> None:
        bench.upstream.plan.extend([bench.upstream.answer, dies(0)])
        outputs = await bench.outputs(prompt_alternatives=0)
        assert [output.ids[0] for output in outputs] == EXPECTED
        assert len(bench.upstream.requests) == 4

    run(test)


AFTER = {
    "death": dies(2),
    "an error event": error_event(500, after=2),
    "an early end": sends(after=2),
    "silence": silent(2),
}


@pytest.mark.parametrize("failure", AFTER)
def test_a_request_that_has_brought_tokens_is_lost(failure):
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(AFTER[failure])
        found: list[int] = []

        async def read() -> None:
            async for output in bench.generate():
                found.extend(output.ids)

        with pytest.raises(SampleLost):
            await read()
        assert found == EXPECTED[:2]
        assert len(bench.upstream.requests) == 1

    run(test)


def test_a_request_that_is_always_broken_off_is_given_up():
    async def test(bench: Bench) -> None:
        bench.upstream.answer = dies(-1)
        with pytest.raises(SampleLost):
            await bench.ids()
        assert len(bench.upstream.requests) == MOST_BROKEN

    run(test)


def test_an_upstream_that_is_busy_is_asked_until_it_is_not():
    async def test(bench: Bench) -> None:
        bench.upstream.plan.extend([status(503)] * (MOST_BROKEN + 1))
        assert await bench.ids() == EXPECTED

    run(test)


def test_an_upstream_that_does_not_come_back_is_not_waited_for_for_ever():
    async def test(bench: Bench) -> None:
        await bench.upstream.stop()
        with pytest.raises(SampleLate):
            await bench.ids()

    run(test, patience=0.5)


def test_requests_wait_until_the_upstream_is_back():
    async def test(bench: Bench) -> None:
        await bench.upstream.stop()
        waiting = [asyncio.create_task(bench.ids()) for _ in range(3)]
        await asyncio.sleep(0.3)
        assert not any(task.done() for task in waiting)
        await bench.upstream.start()
        assert await asyncio.gather(*waiting) == [EXPECTED] * 3

    run(test)


def test_another_model_ends_the_worker(monkeypatch):
    ended = asyncio.Event()

    def end() -> None:
        ended.set()
        raise asyncio.CancelledError

    monkeypatch.setattr(model_module, "end_process", end)

    async def test(bench: Bench) -> None:
        await bench.upstream.stop()
        bench.upstream.models = ["other"]
        await bench.upstream.start()
        bench.upstream.plan.append(status(500))
        task = asyncio.create_task(bench.ids())
        await ended.wait()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert len(bench.upstream.requests) == 1

    run(test)


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Has an entry when the worker would have ended; the request that notices it is then cancelled."""
    found: list[bool] = []

    def end() -> None:
        found.append(True)
        raise asyncio.CancelledError

    monkeypatch.setattr(model_module, "end_process", end)
    return found


@pytest.mark.parametrize("models", [["other"], ["a", "b"]], ids=["one", "several"])
def test_another_model_that_refuses_the_name_of_the_old_one_ends_the_worker(ended, models):
    """The upstream has restarted while no request ran, so that no connection broke."""

    async def test(bench: Bench) -> None:
        bench.upstream.models = models
        with pytest.raises(asyncio.CancelledError):
            await bench.ids()
        assert ended

    run(test)


@pytest.mark.parametrize("number", [401, 403, 404])
def test_a_refusal_that_another_model_explains_ends_the_worker(ended, number):
    async def test(bench: Bench) -> None:
        bench.upstream.length = 100
        bench.upstream.plan.append(status(number))
        with pytest.raises(asyncio.CancelledError):
            await bench.ids()
        assert ended

    run(test)


def test_several_models_without_the_old_one_are_not_waited_for(ended, caplog):
    async def test(bench: Bench) -> None:
        bench.upstream.models = ["a", "b"]
        bench.upstream.plan.append(status(500))
        with pytest.raises(asyncio.CancelledError):
            await bench.ids()
        assert ended

    run(test)
    assert "serves other models than toy: it serves 2 models (a, b)" in caplog.text


def test_the_old_model_among_several_is_used_again(ended):
    async def test(bench: Bench) -> None:
        bench.upstream.models = ["big/toy", "toy"]
        bench.upstream.plan.append(status(500))
        assert await bench.ids() == EXPECTED
        assert not ended

    run(test)


async def lists_nothing(exchange: Exchange) -> None:
    await asyncio.Event().wait()


async def lists_garbage(exchange: Exchange) -> None:
    exchange.send_whole(200, b"[" * 100_000)


@pytest.mark.parametrize(
    ("lists", "reason"),
    [(lists_nothing, "no answer for 0.2 s"), (lists_garbage, "is no JSON"), (status(404), "status 404")],
    ids=["silence", "nesting", "404"],
)
def test_an_upstream_that_does_not_say_its_model_is_asked_again_soon(monkeypatch, caplog, lists, reason):
    """Not only after the time that a completion may take. The reason is logged."""
    monkeypatch.setattr(upstream_module, "_GET_SECONDS", 0.2)

    async def test(bench: Bench) -> None:
        bench.upstream.lists = lists
        bench.upstream.plan.append(status(503))
        task = asyncio.create_task(bench.ids())
        while reason not in caplog.text:
            await asyncio.sleep(0.01)
        bench.upstream.lists = None
        assert await task == EXPECTED

    run(test, silence=1000.0)


def test_all_that_wait_fail_if_the_wait_itself_fails(monkeypatch):
    async def fails(*_: Any) -> None:
        await asyncio.sleep(0.05)
        raise LookupError("a fault")

    async def test(bench: Bench) -> None:
        monkeypatch.setattr(model_module, "find_identity", fails)
        bench.upstream.plan.extend([status(503)] * 3)
        found = await asyncio.gather(*(bench.ids() for _ in range(3)), return_exceptions=True)
        assert [type(each) for each in found] == [LookupError] * 3
        monkeypatch.undo()
        bench.upstream.plan.append(status(503))
        assert await bench.ids() == EXPECTED

    run(test)


def test_fewer_alternatives_than_requested_end_a_request():
    async def test(bench: Bench) -> None:
        bench.upstream.answer = clamps(3)
        assert len(await bench.outputs(alternatives=2)) == 4
        with pytest.raises(SampleRefused, match="fewer alternatives"):
            await bench.ids(alternatives=3)
        assert len(await bench.outputs(prompt_alternatives=3)) == 4
        with pytest.raises(SampleRefused, match="fewer alternatives"):
            await bench.ids(prompt_alternatives=5)

    run(test)


@pytest.mark.parametrize("number", [400, 401, 403, 404, 307])
def test_a_refused_request_is_not_sent_again(number):
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(status(number))
        with pytest.raises(SampleRefused, match=f"^status {number}$"):
            await bench.ids()
        assert len(bench.upstream.requests) == 1

    run(test)


GARBAGE = [b"<html>\n", b"data: {]\n\n", b"data: {}\n\n", b"data: " + b"x" * 3 * 2**20, b'data: {"choices": [1]}\n\n']


@pytest.mark.parametrize("data", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_ends_a_request(data):
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(sends(data, after=1))
        with pytest.raises(SampleRefused):
            await bench.ids()

    run(test)


def test_more_tokens_than_requested_end_a_request():
    async def test(bench: Bench) -> None:
        token = b'data: {"choices": [{"index": 0, "token_ids": [3, 4, 5]}]}\n\n'
        bench.upstream.plan.append(sends(token, token))
        with pytest.raises(SampleRefused, match="more tokens"):
            await bench.ids()

    run(test)


def test_a_response_that_is_too_large_is_not_kept():
    async def test(bench: Bench) -> None:
        async def large(exchange: Any) -> None:
            exchange.send_whole(200, b"x" * 1000)

        bench.upstream.plan.append(large)
        with pytest.raises(Malformed, match="more than 999 bytes"):
            await bench.client.post(GENERATE, b'{"token_ids": [1], "sampling_params": {}}', most=999)

    run(test)


def test_single_bytes_do_not_prolong_the_time_of_an_event():
    async def test(bench: Bench) -> None:
        async def drips(exchange: Any) -> None:
            exchange.begin()
            while True:
                await exchange.chunk(b" ")
                await asyncio.sleep(SILENCE / 10)

        bench.upstream.plan.append(drips)
        body = b'{"token_ids": [1], "sampling_params": {}}'
        with pytest.raises(Broken, match="no answer"):
            async for _ in bench.client.events(GENERATE, body, 2**20):
                pass

    run(test)


def test_a_sample_that_is_closed_closes_its_request():
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(silent(1))
        outputs = bench.generate()
        await anext(outputs)
        await outputs.aclose()
        while not bench.upstream.left:
            await asyncio.sleep(0.01)

    run(test)


def test_a_sample_that_is_cancelled_before_the_first_token_closes_its_request():
    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(silent(0))
        task = asyncio.create_task(bench.ids())
        while not bench.upstream.requests:
            await asyncio.sleep(0.01)
        task.cancel()
        while not bench.upstream.left:
            await asyncio.sleep(0.01)
        assert len(bench.upstream.requests) == 1

    run(test)


@pytest.mark.parametrize("verbose", [False, True])
def test_what_the_upstream_says_is_told_only_if_wanted(caplog, verbose):
    """It may quote the prompt."""

    async def test(bench: Bench) -> None:
        bench.upstream.plan.append(status(500))
        await bench.ids()

    with caplog.at_level(logging.WARNING, logger="afterword"):
        run(test, verbose=verbose)
    assert "status 500" in caplog.text
    assert ("message" in caplog.text) == verbose
