"""Which text is sent to the engine next, and what becomes of texts whose client leaves or whose engine dies."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from msgspec.structs import replace

from afterword.engine import messages
from afterword.engine.parent.tokenizer_client import MAX_SHORT_TEXT, TokenizerClient, check_text
from afterword.errors import EngineFailure, RequestError
from scripted_engine import CARD

LONG = "x" * (MAX_SHORT_TEXT + 1)


class Queue:
    """Texts whose engine is this test. `asked`: what it was told, in order."""

    def __init__(self, living: bool = True) -> None:
        self.asked: list[messages.TokenizeText | messages.CancelTokenize] = []
        self.tokenizer_client = TokenizerClient(self.asked.append)
        if living:
            self.tokenizer_client.resend()

    async def add(self, text: str, client: str = "") -> asyncio.Task[Sequence[int]]:
        task = asyncio.create_task(self.tokenizer_client.tokenize(text, True, 0.0, client))
        await asyncio.sleep(0)
        return task

    @property
    def sent(self) -> list[str]:
        return [each.text for each in self.asked if isinstance(each, messages.TokenizeText)]

    @property
    def forgotten(self) -> list[str]:
        names = {each.call: each.text for each in self.asked if isinstance(each, messages.TokenizeText)}
        return [names[each.call] for each in self.asked if isinstance(each, messages.CancelTokenize)]

    async def answer(self, text: str) -> None:
        """The engine has tokenized the text that it was told last of those with these letters."""
        call = next(c for c in self.asked[::-1] if isinstance(c, messages.TokenizeText) and c.text == text)
        self.tokenizer_client.handle_tokens(messages.TextTokens.of(call.call, (len(text),), call.long))
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def leave(*tasks: asyncio.Task[Sequence[int]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def test_short_texts_do_not_wait_for_long_ones() -> None:
    async def test() -> None:
        queue = Queue()
        long = [await queue.add(LONG) for _ in range(20)]
        short = await queue.add("short")
        assert queue.sent == [LONG, "short"]
        await queue.answer("short")
        assert tuple(await short) == (5,)
        await leave(*long)

    run(test)


def test_the_engine_has_one_long_text_and_few_short_ones_at_a_time() -> None:
    async def test() -> None:
        queue = Queue()
        tasks = [await queue.add(f"{kind}{number}") for kind in ("", LONG) for number in range(20)]
        assert queue.sent == [*map(str, range(8)), LONG + "0"]
        await queue.answer("3")
        assert queue.sent[9:] == ["8"]
        await queue.answer(LONG + "0")
        assert queue.sent[10:] == [LONG + "1"]
        await leave(*tasks)

    run(test)


def test_clients_take_turns() -> None:
    async def test() -> None:
        queue = Queue()
        tasks = [await queue.add(LONG + f"A{number}", "A") for number in range(4)]
        tasks += [await queue.add(LONG + "B0", "B"), await queue.add(LONG + "C0", "C")]
        for _ in range(5):
            await queue.answer(queue.sent[-1])
        assert [text[len(LONG) :] for text in queue.sent] == ["A0", "A1", "B0", "C0", "A2", "A3"]
        await leave(*tasks)

    run(test)


def test_of_a_clients_texts_the_shortest_comes_first() -> None:
    async def test() -> None:
        queue = Queue()
        tasks = [await queue.add(LONG + "x" * more) for more in (0, 9, 5, 7)]
        for _ in range(3):
            await queue.answer(queue.sent[-1])
        assert [len(text) - len(LONG) for text in queue.sent] == [0, 5, 7, 9]
        await leave(*tasks)

    run(test)


def test_a_text_whose_client_has_left_is_never_begun() -> None:
    async def test() -> None:
        queue = Queue()
        first, *abandoned = [await queue.add(LONG + str(number), "A") for number in range(8)]
        await leave(*abandoned)
        other = await queue.add(LONG + "B", "B")
        await queue.answer(LONG + "0")
        assert queue.sent == [LONG + "0", LONG + "B"]
        assert len(queue.tokenizer_client) == 1
        await leave(first, other)

    run(test)


def test_the_engine_is_told_when_the_client_of_a_text_at_work_leaves() -> None:
    async def test() -> None:
        queue = Queue()
        first, second = await queue.add(LONG + "0"), await queue.add(LONG + "1")
        await leave(first)
        assert queue.forgotten == [LONG + "0"]
        assert queue.sent == [LONG + "0"], "the engine has not stopped yet"
        await queue.answer(LONG + "0")
        assert queue.sent[1:] == [LONG + "1"]
        await queue.answer(LONG + "1")
        assert tuple(await second) == (len(LONG) + 1,)
        assert queue.tokenizer_client.sizes_in_progress == (0, 0)
        assert len(queue.tokenizer_client) == 0

    run(test)


def test_nothing_is_sent_while_there_is_no_engine() -> None:
    async def test() -> None:
        queue = Queue(living=False)
        task = await queue.add("a")
        assert queue.sent == []
        queue.tokenizer_client.resend()
        assert queue.sent == ["a"]
        queue.tokenizer_client.handle_worker_death(2, EngineFailure())
        other = await queue.add("b")
        assert queue.sent == ["a"]
        queue.tokenizer_client.resend()
        assert queue.sent == ["a", "a"], "the suspect alone"
        await queue.answer("a")
        assert queue.sent == ["a", "a", "b"]
        await leave(task, other)

    run(test)


def test_of_a_short_and_a_long_text_at_work_the_one_that_kills_is_found_out() -> None:
    async def test() -> None:
        queue = Queue()
        short, waiting, long = await queue.add("short"), await queue.add("waiting"), await queue.add(LONG)
        assert queue.tokenizer_client.sizes_in_progress == (5, len(LONG))
        assert queue.tokenizer_client.handle_worker_death(2, EngineFailure()) is None
        assert queue.tokenizer_client.has_suspects
        queue.tokenizer_client.resend()
        assert queue.sent[3:] == ["short"], "each of them alone"
        await queue.answer("short")
        assert queue.sent[4:] == [LONG]
        assert queue.tokenizer_client.handle_worker_death(2, EngineFailure()) == LONG
        with pytest.raises(EngineFailure):
            await long
        queue.tokenizer_client.resend()
        assert queue.sent[5:] == ["waiting"]
        await queue.answer("waiting")
        assert [*await short, *await waiting] == [5, 7]
        assert not queue.tokenizer_client.has_suspects

    run(test)


def test_an_abandoned_text_that_was_at_work_is_not_tried_again() -> None:
    async def test() -> None:
        queue = Queue()
        await leave(await queue.add("bad"))
        assert queue.tokenizer_client.sizes_in_progress == (3, 0)
        assert queue.tokenizer_client.handle_worker_death(2, EngineFailure()) is None
        queue.tokenizer_client.resend()
        assert queue.sent == ["bad"]
        assert not queue.tokenizer_client.has_suspects

    run(test)


def test_a_text_beyond_the_limit_is_refused() -> None:
    check_text("x" * 10, 10, CARD)
    with pytest.raises(RequestError, match=r"11 characters, and at most 10 .* max_text"):
        check_text("x" * 11, 10, CARD)


@pytest.mark.parametrize("text", ["\t" * 5, "a" + " \n" * 3 + "b", "x\u3000    x"])
def test_a_run_that_takes_the_tokenizer_too_long_is_refused(text: str) -> None:
    model_info = replace(CARD, slow_runs=(r"\s", 4))
    check_text("    a    b    ", 100, model_info)
    with pytest.raises(RequestError, match="more than 4 consecutive characters"):
        check_text(text, 100, model_info)
