"""Rows of a whole vocabulary: limits on what is held back, and the engine's pauses for a reader that is behind."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from array import array
from typing import Any

import pytest

from afterword.completion import choice, full_rows, response_size, run, step_queue
from afterword.completion.logprobs import top_map
from afterword.completion.plan import Plan, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.response_size import check_size, estimate_bytes
from afterword.engine import token_row
from afterword.engine.protocol import Step, Token
from afterword.engine.token_row import PACKED_BYTES, TokenRow
from afterword.errors import RequestError
from scripted_engine import MODEL_INFO, ScriptedEngine, text_script

COUNT = len(MODEL_INFO.pieces)


def plan(**fields: Any) -> Plan:
    request = CompletionRequest(**{"prompt": ("a",), "logprobs": COUNT} | fields)
    engine = ScriptedEngine(text_script("a"))
    return make_plan(request, MODEL_INFO, asyncio.run(run.tokenize(request, engine)), 0)


def packed(token: int, ids: list[int], values: list[float]) -> Token:
    row = TokenRow(len(ids), array("d", values).tobytes(), array("i", ids).tobytes())
    return Token(token, values[ids.index(token)], row=row)


@pytest.fixture(autouse=True)
def everything_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripted vocabulary is small: let more than 20 alternatives be packed."""
    monkeypatch.setattr(token_row, "MAX_LISTED", 20)


def test_a_row_is_made_in_parts_with_the_token_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_rows, "PART_ENTRIES", 2)
    token = packed(98, [97, 98, 99, 100, 101], [-1.0, -2.0, -3.0, -4.0, -math.inf])
    row = top_map(token, plan())
    assert isinstance(row, full_rows.FullRow)
    parts = list(row.parts())
    assert [len(part) for part in parts] == [2, 2, 1]  # the token itself, and those of ranks 1, 3, 4 and 5
    assert list(row.whole().items()) == [("b", -2.0), ("a", -1.0), ("c", -3.0), ("d", -4.0), ("e", -9999.0)]


def test_a_part_without_new_texts_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(full_rows, "PART_ENTRIES", 1)
    row = top_map(packed(97, [97, 98], [-1.0, -2.0]), dataclasses.replace(plan(), pieces=(b"a",) * COUNT))
    assert isinstance(row, full_rows.FullRow)
    assert list(row.parts()) == [{"a": -1.0}]


@pytest.mark.parametrize("name", ["stop", "banned_strings", "bad_words"])
def test_a_text_that_may_hold_back_too_many_rows_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(response_size, "MAX_HELD_BYTES", 8 * COUNT * PACKED_BYTES)
    check_size(plan(**{name: ("12345678",)}), 2**40)
    check_size(plan(**{name: ("123456789",)}, logprobs=20), 2**40)
    with pytest.raises(RequestError) as caught:
        check_size(plan(**{name: ("x", "1234567é")}), 2**40)
    assert caught.value.param == name
    assert "at most 8" in caught.value.message
    for fields in ({"best_of": 3}, {"prompt": ("a", "b", "c")}):
        check_size(plan(**{name: ("12",)}, **fields), 2**40)
        with pytest.raises(RequestError):
            check_size(plan(**{name: ("123",)}, **fields), 2**40)


@pytest.mark.parametrize("name", ["banned_strings", "bad_words"])
def test_a_token_held_in_the_worker_has_the_logits_of_the_vocabulary(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(response_size, "MAX_HELD_BYTES", 8 * COUNT * 4)
    few = COUNT // 4  # alternatives, which take less than the logits
    check_size(plan(**{name: ("12345678",)}, logprobs=few), 2**40)
    check_size(plan(stop=("123456789",), logprobs=few), 2**40)
    with pytest.raises(RequestError) as caught:
        check_size(plan(**{name: ("123456789",)}, logprobs=few), 2**40)
    assert caught.value.param == name


@pytest.mark.parametrize(("begins", "stop"), [(ord("a"), ("ab",)), (0xC3, ())], ids=["stop string", "character"])
def test_rows_of_tokens_without_bytes_are_bounded(
    monkeypatch: pytest.MonkeyPatch, begins: int, stop: tuple[str, ...]
) -> None:
    """Such a token is held as long as the text before it. All choices of a request count together."""
    row = packed(98, list(range(97, 297)), [-1.0] * 200).row
    assert row
    monkeypatch.setattr(choice, "MAX_HELD_BYTES", 6 * row.size)
    whole = dataclasses.replace(plan(max_tokens=40, stop=stop), silent=frozenset({7}))
    shared = choice.Shared()
    first, second = (choice.ChoiceBuilder(whole, whole.prompts[0], None, None, shared) for _ in range(2))

    def add(builder: choice.ChoiceBuilder, *tokens: int) -> int:
        for token in tokens:
            builder.add(Token(token, -1.0, row=row))
            builder.deltas(0)
        return builder.completion_tokens

    assert add(first, *[ord("x")] * 20) == 20
    assert add(first, begins) == 20
    assert add(second, begins, 7, 7, 7, 7) == 0
    with pytest.raises(RequestError) as caught:
        add(first, 7)
    assert (caught.value.param, caught.value.code) == ("logprobs", "answer_too_large")
    second.end("length")
    second.deltas(0)
    assert add(first, 7, ord("x")) == 24, "rows that were sent do not count"


def test_rows_count_in_a_response_that_is_not_streamed() -> None:
    fields: dict[str, Any] = {"echo": True, "prompt_logprobs": COUNT, "max_tokens": 10}
    whole, streamed = plan(**fields), plan(**fields, stream=True)
    assert estimate_bytes(whole) > 10 * COUNT * 30
    assert estimate_bytes(streamed) < 11 * 300
    few = estimate_bytes(plan(**fields | {"prompt_logprobs": 20, "logprobs": 20}, stream=True))
    assert few > estimate_bytes(streamed), "listed alternatives count in a stream too"


def test_rows_of_candidates_count_until_the_best_are_known() -> None:
    assert estimate_bytes(plan(best_of=20, max_tokens=10)) >= 20 * 10 * COUNT * PACKED_BYTES
    assert estimate_bytes(plan(best_of=2, max_tokens=10)) == estimate_bytes(plan(max_tokens=10))


def test_the_size_of_a_step_has_its_rows() -> None:
    token = packed(98, list(range(97, 297)), [-1.0] * 200)
    assert token.size >= 200 * PACKED_BYTES
    assert Step(sampled=((0, token), (1, token))).size == 2 * token.size
    assert dataclasses.is_dataclass(full_rows.FullRow)


def test_the_engine_is_paused_while_rows_wait_for_their_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_queue, "MAX_UNREAD_BYTES", 5 * 200 * PACKED_BYTES)
    engine = ScriptedEngine(lambda *_: iter(lambda: 98, None))
    whole = plan(max_tokens=40, stream=True, echo=True)
    row = packed(98, list(range(97, 297)), [-1.0] * 200)

    async def read() -> int:
        deltas = run.run(whole, engine)
        await anext(deltas)
        engine.jobs[0].step = with_rows(engine.jobs[0].step)  # type: ignore[method-assign]
        for _ in range(100):
            await asyncio.sleep(0)
        pauses = engine.jobs[0].pauses
        await deltas.aclose()
        return pauses

    def with_rows(step: Any) -> Any:
        return lambda *given: Step(sampled=((0, row),)) if step(*given) else None

    assert asyncio.run(read()) > 0, "without their rows 40 tokens have 7 KB"
