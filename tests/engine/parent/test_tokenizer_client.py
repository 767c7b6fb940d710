"""Tests of the order in which texts are sent to the worker, and of cancelled texts and worker crashes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from msgspec.structs import replace

from afterword.engine import messages
from afterword.engine.parent.tokenizer_client import MAX_SHORT_TEXT, TokenizerClient, check_text
from afterword.errors import EngineFailure, RequestError
from scripted_engine import MODEL_INFO

LONG = "x" * (MAX_SHORT_TEXT + 1)


class ScriptedWorker:
    """A tokenizer client whose worker the test plays. `messages_sent`: the messages to the worker, in order."""

    def __init__(self, alive: bool = True) -> None:
        self.messages_sent: list[messages.TokenizeText | messages.CancelTokenize] = []
        self.tokenizer_client = TokenizerClient(self.messages_sent.append)
        if alive:
            self.tokenizer_client.resend()

    async def add(self, text: str, client: str = "") -> asyncio.Task[Sequence[int]]:
        task = asyncio.create_task(self.tokenizer_client.tokenize(text, True, 0.0, client))
        await asyncio.sleep(0)
        return task

    @property
    def sent(self) -> list[str]:
        return [each.text for each in self.messages_sent if isinstance(each, messages.TokenizeText)]

    @property
    def cancelled(self) -> list[str]:
        names = {each.call: each.text for each in self.messages_sent if isinstance(each, messages.TokenizeText)}
        return [names[each.call] for each in self.messages_sent if isinstance(each, messages.CancelTokenize)]

    async def answer(self, text: str) -> None:
        """Answer the last message with this text."""
        call = next(c for c in self.messages_sent[::-1] if isinstance(c, messages.TokenizeText) and c.text == text)
        self.tokenizer_client.handle_tokens(messages.TextTokens.of(call.call, (len(text),), call.long))
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def cancel(*tasks: asyncio.Task[Sequence[int]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_short_texts_do_not_wait_for_long_ones() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        long = [await worker.add(LONG) for _ in range(20)]
        short = await worker.add("short")
        assert worker.sent == [LONG, "short"]
        await worker.answer("short")
        assert tuple(await short) == (5,)
        await cancel(*long)

    run(test)


def test_the_worker_holds_one_long_text_and_eight_short_ones() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        tasks = [await worker.add(f"{kind}{number}") for kind in ("", LONG) for number in range(20)]
        assert worker.sent == [*map(str, range(8)), LONG + "0"]
        await worker.answer("3")
        assert worker.sent[9:] == ["8"]
        await worker.answer(LONG + "0")
        assert worker.sent[10:] == [LONG + "1"]
        await cancel(*tasks)

    run(test)


def test_clients_are_served_in_turn() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        tasks = [await worker.add(LONG + f"A{number}", "A") for number in range(4)]
        tasks += [await worker.add(LONG + "B0", "B"), await worker.add(LONG + "C0", "C")]
        for _ in range(5):
            await worker.answer(worker.sent[-1])
        assert [text[len(LONG) :] for text in worker.sent] == ["A0", "A1", "B0", "C0", "A2", "A3"]
        await cancel(*tasks)

    run(test)


def test_the_shortest_text_of_a_client_is_sent_first() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        tasks = [await worker.add(LONG + "x" * more) for more in (0, 9, 5, 7)]
        for _ in range(3):
            await worker.answer(worker.sent[-1])
        assert [len(text) - len(LONG) for text in worker.sent] == [0, 5, 7, 9]
        await cancel(*tasks)

    run(test)


def test_a_cancelled_text_in_the_queue_is_not_sent() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        first, *cancelled = [await worker.add(LONG + str(number), "A") for number in range(8)]
        await cancel(*cancelled)
        other = await worker.add(LONG + "B", "B")
        await worker.answer(LONG + "0")
        assert worker.sent == [LONG + "0", LONG + "B"]
        assert len(worker.tokenizer_client) == 1
        await cancel(first, other)

    run(test)


def test_a_cancelled_text_at_the_worker_is_cancelled_there() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        first, second = await worker.add(LONG + "0"), await worker.add(LONG + "1")
        await cancel(first)
        assert worker.cancelled == [LONG + "0"]
        assert worker.sent == [LONG + "0"], "the worker has not answered the cancelled text yet"
        await worker.answer(LONG + "0")
        assert worker.sent[1:] == [LONG + "1"]
        await worker.answer(LONG + "1")
        assert tuple(await second) == (len(LONG) + 1,)
        assert worker.tokenizer_client.sizes_in_progress == (0, 0)
        assert len(worker.tokenizer_client) == 0

    run(test)


def test_nothing_is_sent_while_no_worker_is_alive() -> None:
    async def test() -> None:
        worker = ScriptedWorker(alive=False)
        task = await worker.add("a")
        assert worker.sent == []
        worker.tokenizer_client.resend()
        assert worker.sent == ["a"]
        worker.tokenizer_client.handle_worker_death(2, EngineFailure())
        other = await worker.add("b")
        assert worker.sent == ["a"]
        worker.tokenizer_client.resend()
        assert worker.sent == ["a", "a"], "the suspect is sent alone"
        await worker.answer("a")
        assert worker.sent == ["a", "a", "b"]
        await cancel(task, other)

    run(test)


def test_the_text_that_crashes_the_worker_is_identified() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        short, waiting, long = await worker.add("short"), await worker.add("waiting"), await worker.add(LONG)
        assert worker.tokenizer_client.sizes_in_progress == (5, len(LONG))
        assert worker.tokenizer_client.handle_worker_death(2, EngineFailure()) is None
        assert worker.tokenizer_client.has_suspects
        worker.tokenizer_client.resend()
        assert worker.sent[3:] == ["short"], "each suspect is sent alone"
        await worker.answer("short")
        assert worker.sent[4:] == [LONG]
        assert worker.tokenizer_client.handle_worker_death(2, EngineFailure()) == LONG
        with pytest.raises(EngineFailure):
            await long
        worker.tokenizer_client.resend()
        assert worker.sent[5:] == ["waiting"]
        await worker.answer("waiting")
        assert [*await short, *await waiting] == [5, 7]
        assert not worker.tokenizer_client.has_suspects

    run(test)


def test_a_cancelled_suspect_is_not_sent_again() -> None:
    async def test() -> None:
        worker = ScriptedWorker()
        await cancel(await worker.add("bad"))
        assert worker.tokenizer_client.sizes_in_progress == (3, 0)
        assert worker.tokenizer_client.handle_worker_death(2, EngineFailure()) is None
        worker.tokenizer_client.resend()
        assert worker.sent == ["bad"]
        assert not worker.tokenizer_client.has_suspects

    run(test)


def test_a_text_above_the_limit_is_refused() -> None:
    check_text("x" * 10, 10, MODEL_INFO)
    with pytest.raises(RequestError, match=r"11 characters, but at most 10 .* max_text"):
        check_text("x" * 11, 10, MODEL_INFO)


@pytest.mark.parametrize("text", ["\t" * 5, "a" + " \n" * 3 + "b", "x\u3000    x"])
def test_a_slow_run_of_characters_is_refused(text: str) -> None:
    model_info = replace(MODEL_INFO, slow_runs=(r"\s", 4))
    check_text("    a    b    ", 100, model_info)
    with pytest.raises(RequestError, match="more than 4 consecutive characters"):
        check_text(text, 100, model_info)
