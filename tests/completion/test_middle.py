"""`MiddleEnd` and `Middle`: where the middles of `/infill` end, and why."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from afterword.completion.infill import InfillRules
from afterword.completion.middle import Middle, MiddlePart
from afterword.completion.middle_end import MiddleEnd
from afterword.completion.plan import make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.run import Usage, run, tokenize
from scripted_engine import EOS, INFILL, MODEL_INFO, ScriptedEngine, ids, text_script

RULES = InfillRules(always=True, snippets=True, fill_context=True)


def ended(text: str, indent: int, *, late_after: int | None = None, cuts: tuple[int, ...] = ()) -> tuple[str, bool]:
    """What is shown of a text that arrives in pieces. `late_after`: line ends after which the time is over."""
    seen = 0

    def is_late() -> bool:
        nonlocal seen
        seen += 1
        return late_after is not None and seen > late_after

    end = MiddleEnd(indent, is_late)
    marks = (0, *sorted(cuts), len(text))
    shown = "".join(end.feed(text[start:stop]) for start, stop in pairwise(marks))
    return shown + end.finish(), end.ended


@pytest.mark.parametrize(
    ("text", "indent", "expected"),
    [
        ("a\nb\n\nc", 0, "a\nb\n\nc"),
        ("a\n  b\n  c", 2, "a\n  b\n  c"),
        ("a\n  b\n c", 2, "a\n  b"),
        ("a\n\t\tb\n\tc", 2, "a\n\t\tb"),
        ("a\n\n  b", 2, "a"),  # an empty line ends the middle, as in llama-server
        ("a\n    \n  b\nc", 2, "a\n    \n  b"),
        ("a\n ", 2, "a\n "),  # undecided at the end
        ("", 2, ""),
    ],
)
def test_a_line_with_less_indentation_ends_the_text(text: str, indent: int, expected: str) -> None:
    assert ended(text, indent) == (expected, expected != text)


@given(st.text("a \t\n", max_size=12), st.integers(0, 3), st.lists(st.integers(0, 12), max_size=3))
def test_the_end_does_not_depend_on_how_the_text_arrives(text: str, indent: int, cuts: list[int]) -> None:
    within = tuple(min(cut, len(text)) for cut in cuts)
    assert ended(text, indent, cuts=within) == ended(text, indent)


@pytest.mark.parametrize("indent", [0, 1])
def test_when_the_time_is_over_the_next_line_end_ends_the_text(indent: int) -> None:
    assert ended("a\n b\n c\n", indent, late_after=1) == ("a\n b", True)
    assert ended("a b c", indent, late_after=0) == ("a b c", False)


def generated(text: str, **fields: Any) -> tuple[list[MiddlePart], Middle]:
    """The parts and the middle of a request whose model generates a text."""
    fewer = fields.pop("fewer", False)
    indent = fields.pop("indent", 0)
    request = CompletionRequest(prompt=("Hello",), suffix="", return_token_ids=True, **fields)
    engine = ScriptedEngine(text_script(text), replace(MODEL_INFO, infill=INFILL))

    async def collect() -> tuple[list[MiddlePart], Middle]:
        tokens = await tokenize(request, engine, False, rules=RULES)
        plan = make_plan(request, engine.model_info, tokens, 0)
        middle = Middle(plan, indent, lambda: False, fewer)
        parts = [middle.add(item) async for item in run(plan, engine) if not isinstance(item, Usage)]
        return [part for part in parts if part is not None], middle

    return asyncio.run(collect())


def test_a_middle_that_ends_by_itself() -> None:
    parts, middle = generated(" cat sat")
    assert (middle.text, middle.stop, middle.stop_word) == (" cat sat", "eos", "")
    assert middle.tokens == (*ids(" cat sat"), EOS)
    assert "".join(part.text for part in parts) == middle.text
    assert [part.stop for part in parts][-1] == "eos"
    assert tuple(token for part in parts for token in part.tokens) == middle.tokens


def test_the_longest_stop_string_that_follows_the_text_is_named() -> None:
    _, middle = generated(" cat sat", stop=(" s", "sat", " sat"), max_tokens=8)
    assert (middle.text, middle.stop, middle.stop_word) == (" cat", "word", " sat")


def test_a_limit_of_tokens_ends_a_middle() -> None:
    _, middle = generated(" cat sat", max_tokens=1)
    assert (middle.text, middle.stop, middle.truncated) == (" cat", "limit", False)
    _, middle = generated(" cat sat", max_tokens=1, fewer=True)
    assert middle.truncated


def test_indentation_ends_a_middle_and_nothing_follows() -> None:
    parts, middle = generated("a\n  b\nc the cat", indent=2, max_tokens=40)
    assert (middle.text, middle.stop) == ("a\n  b", "limit")
    assert "".join(part.text for part in parts) == "a\n  b"
    assert [part.stop for part in parts].count("limit") == 1
