"""`infill_trim.trim`: what is left out of infill prompts that are too long for the context."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from afterword.completion.infill import InfillRules
from afterword.completion.infill_trim import InfillTexts, trim
from afterword.completion.object_fields import ContextFile
from afterword.completion.plan import PromptPlan, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.run import tokenize
from afterword.engine.protocol import InfillLayout
from afterword.errors import RequestError
from scripted_engine import INFILL, MID, MODEL_INFO, PIECES, PRE, SUF, ScriptedEngine, ids, text_script

BYTES = st.lists(st.sampled_from(b"ab \n"), max_size=40).map(tuple)
FILES = st.lists(BYTES, max_size=3).map(tuple)


def size(texts: InfillTexts, separators: int) -> int:
    return len(texts.prefix) + len(texts.suffix) + sum(len(file) + separators for file in texts.files)


@given(BYTES, BYTES, FILES, st.integers(-3, 100), st.integers(0, 2))
def test_what_is_left_fits_and_is_what_is_next_to_the_cursor(
    prefix: tuple[int, ...], suffix: tuple[int, ...], files: tuple[tuple[int, ...], ...], room: int, separators: int
) -> None:
    whole = InfillTexts(prefix, suffix, files)
    left = trim(whole, room, separators, PIECES)
    assert size(left, separators) <= max(room, 0)
    assert prefix[len(prefix) - len(left.prefix) :] == left.prefix
    assert suffix[: len(left.suffix)] == left.suffix
    assert files[len(files) - len(left.files) :] == left.files
    if size(whole, separators) <= room:
        assert left == whole
    if left.files:
        assert (left.prefix, left.suffix) == (prefix, suffix)


def test_lines_stay_whole() -> None:
    prefix, suffix = tuple(b"one line\n" * 20), tuple(b"another\n" * 20)
    left = trim(InfillTexts(prefix, suffix), 80, 0, PIECES)
    assert bytes(left.prefix).startswith(b"one line\n")
    assert bytes(left.suffix).endswith(b"another\n")


def test_a_short_prefix_leaves_its_room_to_the_suffix() -> None:
    left = trim(InfillTexts((1,) * 10, (2,) * 100), 80, 0, PIECES)
    assert (len(left.prefix), len(left.suffix)) == (10, 70)


def test_the_cut_stays_while_the_user_types() -> None:
    """So the prefix cache has the beginning of the next prompt."""
    text = tuple(b"line\n" * 100)
    lefts = [trim(InfillTexts(text + (97,) * typed, text), 160, 0, PIECES) for typed in range(200)]
    starts = [len(text) + typed - len(left.prefix) for typed, left in enumerate(lefts)]
    assert starts == sorted(starts)
    assert len(set(starts)) <= 200 // (160 // 8) + 2


LAYOUT = InfillLayout("qwen", INFILL.parts, with_files=(1, "files", 2, 3, *INFILL.parts), file=(2, "file"))
MODEL = replace(MODEL_INFO, infill=LAYOUT)


def planned(rules: InfillRules = InfillRules(trim=True), **fields: Any) -> PromptPlan:  # noqa: B008
    request = CompletionRequest(**fields)
    engine = ScriptedEngine(text_script(), MODEL)
    (prompt,) = make_plan(request, MODEL, asyncio.run(tokenize(request, engine, rules=rules)), 0).prompts
    return prompt


def test_a_prompt_that_is_too_long_is_shortened() -> None:
    prompt = planned(prompt=("x" * 500 + "y",), suffix="z" * 500, max_tokens=16)
    ids_ = prompt.job.prompt
    assert len(ids_) <= 48
    assert ids_.index(SUF) > 24
    assert (ids_[0], ids_[ids_.index(SUF) - 1], ids_[-1]) == (PRE, ord("y"), MID)
    assert prompt.billed_tokens == len(ids_) - 3
    with pytest.raises(RequestError):
        planned(InfillRules(), prompt=("x" * 500,), suffix="z", max_tokens=16)


def test_files_are_left_out_before_text_at_the_cursor() -> None:
    files = (ContextFile("a" * 20), ContextFile("b" * 20))
    prompt = planned(prompt=("x" * 10,), suffix="z", max_tokens=10, input_extra=files).job.prompt
    assert (ids("b")[0] in prompt, ids("a")[0] in prompt, prompt.count(ord("x"))) == (True, False, 10)
    prompt = planned(prompt=("x" * 40,), suffix="z", max_tokens=10, input_extra=files).job.prompt
    assert prompt == (PRE, *ids("x" * 40), SUF, *ids("z"), MID)


def test_the_most_tokens_to_generate_are_kept_free() -> None:
    with pytest.raises(RequestError, match="maximum context length"):
        planned(prompt=("x",), suffix="z", max_tokens=62)
    fill = InfillRules(always=True, fill_context=True, trim=True)
    prompt = planned(fill, prompt=("x" * 100,), suffix="", max_tokens=1000)
    assert 32 < len(prompt.job.prompt) <= 48, "a quarter of the context stays free"
    assert len(prompt.job.prompt) + prompt.job.max_tokens == 64
    warm = planned(fill, prompt=("x" * 100,), suffix="", max_tokens=0)
    assert warm.job.prompt == prompt.job.prompt


def test_the_middles_of_a_request_have_a_most_number_of_tokens_together() -> None:
    fill = InfillRules(always=True, fill_context=True, most_tokens=60)
    assert planned(fill, prompt=("x",), suffix="", max_tokens=1000, n=3, temperature=1.0).job.max_tokens == 20


def test_prompts_that_are_not_infill_are_never_shortened() -> None:
    with pytest.raises(RequestError, match="maximum context length"):
        planned(prompt=("x" * 100,))
