"""`ChoiceBuilder`: the text, the columns and the finish reason that the tokens of one sample give."""

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from afterword.completion import logprobs, text_stream
from afterword.completion.choice import ChoiceBuilder, Delta, DeltaFolder, fold
from afterword.completion.logprobs import Logprobs, join_columns, make_echo, make_report, token_text, top_map
from afterword.completion.plan import Plan, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.run import tokenize
from afterword.engine.protocol import FinishReason, ModelInfo, Token
from scripted_engine import BLANK, BOS, EOS, MODEL_INFO, ScriptedEngine, ids, report, text_script


def plan(model_info: ModelInfo = MODEL_INFO, **fields: Any) -> Plan:
    request = CompletionRequest(**fields)
    return make_plan(request, model_info, asyncio.run(tokenize(request, ScriptedEngine(text_script(), model_info))), 0)


def build(plan: Plan, tokens: Sequence[int], end: FinishReason = "length") -> tuple[ChoiceBuilder, list[Delta]]:
    """A builder that got these tokens one by one and then the end, and its deltas."""
    prompt = plan.prompts[0]
    wanted = prompt.job.prompt_alternatives
    scored = [report(token, wanted) for token in prompt.job.prompt[1:] if wanted is not None]
    choice = ChoiceBuilder(plan, prompt, make_echo(plan, prompt, scored), make_report(plan, prompt, scored))
    deltas = []
    for count, token in enumerate(tokens, 1):
        choice.add(report(token, prompt.job.alternatives))
        if count == len(tokens):
            choice.end(end)
        deltas += choice.deltas(0)
        if choice.finish:
            return choice, deltas
    choice.end(end)
    return choice, choice.deltas(0)


def build_whole(plan: Plan, tokens: Sequence[int], end: FinishReason = "length") -> Delta:
    return fold(build(plan, tokens, end)[1])


def columns(result: Delta) -> Logprobs:
    assert result.logprobs is not None
    return result.logprobs


def texts_and_finishes(deltas: list[Delta]) -> list[tuple[str, FinishReason | None]]:
    return [(delta.text, delta.finish) for delta in deltas]


# ---- finish reasons


def test_length_is_reported_in_the_delta_of_the_last_token() -> None:
    _, deltas = build(plan(prompt=("a",)), ids("Hello world"))
    assert texts_and_finishes(deltas) == [("Hello", None), (" world", "length")]


def test_stop_is_reported_in_a_delta_of_its_own() -> None:
    _, deltas = build(plan(prompt=("a",)), (*ids("Hello world"), EOS), "stop")
    assert texts_and_finishes(deltas) == [("Hello", None), (" world", None), ("", "stop")]


def test_a_choice_ends_before_a_stop_string() -> None:
    _, deltas = build(plan(prompt=("a",), stop=(" sat", "wor")), ids("Hello world sat"))
    assert texts_and_finishes(deltas) == [("Hello", None), (" ", None), ("", "stop")]


def test_text_held_for_a_stop_string_is_released_before_the_end() -> None:
    _, deltas = build(plan(prompt=("a",), stop=("END",)), (*ids("Hello EN"), EOS), "stop")
    assert texts_and_finishes(deltas) == [("Hello", None), (" ", None), ("EN", None), ("", "stop")]
    _, deltas = build(plan(prompt=("a",), stop=("END",)), ids("Hello EN"))
    assert texts_and_finishes(deltas) == [("Hello", None), (" ", None), ("EN", "length")]


def test_a_stop_string_in_the_last_token_finishes_with_stop() -> None:
    assert build_whole(plan(prompt=("a",), stop=(" world",)), ids("Hello world"), "length").finish == "stop"


def test_a_stop_string_that_the_last_bytes_complete_finishes_with_stop() -> None:
    choice, deltas = build(plan(prompt=("a",), stop=("\ufffd",)), ids(b"Hello\xe2"))
    assert (texts_and_finishes(deltas), choice.completion_tokens) == ([("Hello", None), ("", "stop")], 1)


def test_an_end_token_at_max_tokens_finishes_with_stop() -> None:
    assert build_whole(plan(prompt=("a",), max_tokens=2), (*ids("Hello"), EOS), "stop").finish == "stop"


def test_a_stop_string_in_the_prompt_does_not_end_a_choice() -> None:
    result = build_whole(plan(prompt=("a.b.",), echo=True, stop=(".", ".H")), ids("Hello"))
    assert (result.text, result.finish) == ("a.b.Hello", "length")


def test_a_choice_without_tokens_ends_once() -> None:
    assert texts_and_finishes(build(plan(prompt=("a",)), (EOS,), "stop")[1]) == [("", "stop")]
    assert texts_and_finishes(build(plan(prompt=("a",), stop=("Hello",)), ids("Hello"))[1]) == [("", "stop")]


def test_no_delta_ends_inside_a_character() -> None:
    _, deltas = build(plan(prompt=("a",)), ids("😀!"))
    assert texts_and_finishes(deltas) == [("😀", None), ("!", "length")]


def test_an_incomplete_last_character_becomes_a_replacement_character() -> None:
    assert build_whole(plan(prompt=("a",)), ids(b"a\xf0\x9f")).text == "a\ufffd"


# ---- token counts


@pytest.mark.parametrize(
    ("tokens", "stop", "count"),
    [
        (ids("Hello world"), (), 2),
        ((*ids("Hello"), EOS), (), 1),
        ((EOS,), (), 0),
        (ids("Hello, stop"), (", stop",), 1),
        (ids("Hello world"), ("rld",), 2),  # the second token, too: the result contains part of its text
        (ids(b"\xf0\x9f"), (), 1),
        ((*ids("Hello"), BLANK), (), 2),
    ],
)
def test_completion_tokens_count_the_tokens_of_the_text(
    tokens: tuple[int, ...], stop: tuple[str, ...], count: int
) -> None:
    assert build(plan(prompt=("a",), stop=stop, echo=True), tokens, "stop")[0].completion_tokens == count


def test_the_mean_log_probability_is_over_all_generated_tokens() -> None:
    tokens = (*ids("Hello world"), EOS)
    choice, _ = build(plan(prompt=("a",), logprobs=0), tokens, "stop")
    assert choice.mean_logprob == sum(report(token).logprob or 0 for token in tokens) / 3
    assert build(plan(prompt=("a",), logprobs=0), (EOS,), "stop")[0].mean_logprob == report(EOS).logprob


# ---- the columns


def test_without_logprobs_there_are_no_columns() -> None:
    assert all(delta.logprobs is None for delta in build(plan(prompt=("a",), echo=True), ids("Hello world"))[1])


def test_columns_are_parallel_and_count_from_the_prompt() -> None:
    first, second = ids("Hello world")
    assert build_whole(plan(prompt=("héllo 😀 wörld",), logprobs=0), (first, second)).logprobs == Logprobs(
        ("Hello", " world"), (report(first).logprob, report(second).logprob), None, (13, 18)
    )


def test_offsets_of_a_prompt_of_ids_count_from_its_text() -> None:
    prompt = (EOS, *ids("é 😀"), 0xE2)
    assert columns(build_whole(plan(prompt=(prompt,), logprobs=0), ids("a"))).text_offset == (len("</s>é 😀?"),)


def test_alternatives_start_with_the_token_itself() -> None:
    the, cat, sat = ids(" the cat sat")
    top = columns(build_whole(plan(prompt=("a",), logprobs=2), (the, cat, sat))).top_logprobs
    assert top is not None
    assert [[*entry.items()] for entry in top if entry] == [
        [(" the", -0.25), (" cat", -0.5)],  # the token is among the most likely ones: as many as requested
        [(" cat", -0.5), (" the", -0.25)],
        [(" sat", -0.75), (" the", -0.25), (" cat", -0.5)],  # otherwise one more
    ]


def test_of_tokens_with_equal_text_the_chosen_one_stays_and_then_the_likelier() -> None:
    pieces = (b"a", b"b", b"a", b"b", b"")
    the_plan = dataclasses.replace(plan(prompt=("a",), logprobs=4), pieces=pieces)
    entries = top_map(Token(2, -3.0, ((0, -0.5), (1, -1.0), (3, -2.0), (4, -4.0))), the_plan)
    assert list(entries.items()) == [("a", -3.0), ("b", -1.0), ("", -4.0)]


def test_a_character_of_several_tokens_has_one_offset_and_each_its_bytes() -> None:
    assert columns(build_whole(plan(prompt=("ab",), logprobs=0), ids("c😀d"))) == Logprobs(
        ("c", "bytes:\\xf0\\x9f", "bytes:\\x98\\x80", "d"),
        tuple(report(token).logprob for token in ids("c😀d")),
        None,
        (2, 3, 3, 4),
    )


@pytest.mark.parametrize(
    ("piece", "name"),
    [
        (b" the", " the"),
        (b"\n", "\n"),
        (b"\x00", "\0"),
        (b"", ""),
        ("é😀".encode(), "é😀"),
        (b"\xe2\x80", "bytes:\\xe2\\x80"),
        (b" \xe2\x80", "bytes: \\xe2\\x80"),
        (b"a\n\x99~", "bytes:a\\x0a\\x99~"),
    ],
)
def test_token_text(piece: bytes, name: str) -> None:
    assert token_text(piece) == name


def test_a_delta_has_the_columns_of_its_own_tokens() -> None:
    _, deltas = build(plan(prompt=("ab",), logprobs=1), (*ids("😀 the"), EOS), "stop")
    assert [columns(delta).text_offset for delta in deltas] == [(2, 2), (3,), ()]
    assert deltas[-1].logprobs == Logprobs((), (), (), ())


def test_tokens_of_a_stop_string_are_not_in_the_columns() -> None:
    result = columns(build_whole(plan(prompt=("a",), logprobs=0, stop=(", stop",)), ids("Hello, stop")))
    assert result.tokens == ("Hello",)
    result = columns(build_whole(plan(prompt=("a",), logprobs=0, stop=("rld",)), ids("Hello world")))
    assert result.tokens == ("Hello", " world")


# ---- echo


def test_the_prompt_comes_with_the_first_token() -> None:
    _, deltas = build(plan(prompt=("a cat",), echo=True, logprobs=0), ids("Hello world"))
    assert texts_and_finishes(deltas) == [("a catHello", None), (" world", "length")]
    assert [columns(delta).text_offset for delta in deltas] == [(0, 1, 5), (10,)]


def test_an_echo_waits_for_text_that_may_be_shown() -> None:
    _, deltas = build(plan(prompt=("a cat",), echo=True), ids("😀"))
    assert texts_and_finishes(deltas) == [("a cat😀", "length")]


def test_nothing_precedes_the_first_token_of_a_prompt() -> None:
    prompt = ids("Hello cat sat")
    result = columns(build_whole(plan(prompt=("Hello cat sat",), echo=True, logprobs=1), ids(" the")))
    assert result.tokens == ("Hello", " cat", " sat", " the")
    assert result.token_logprobs == (None, -0.5, -0.75, -0.25)
    assert result.top_logprobs == (
        None,
        {" cat": -0.5, " the": -0.25},
        {" sat": -0.75, " the": -0.25},
        {" the": -0.25},
    )
    assert result.text_offset == (0, 5, 9, 13)
    assert len(result.tokens) == len(prompt) + 1


def test_a_prompt_alone_is_scored_without_a_completion() -> None:
    _, deltas = build(plan(prompt=("Hello cat",), echo=True, logprobs=0, max_tokens=0), ())
    assert texts_and_finishes(deltas) == [("Hello cat", "length")]
    assert columns(deltas[0]) == Logprobs(("Hello", " cat"), (None, -0.5), None, (0, 5))


def test_a_prompt_of_one_token_is_scored_too() -> None:
    result = build_whole(plan(prompt=(ids("Hello"),), echo=True, logprobs=2, max_tokens=0), ())
    assert result.logprobs == Logprobs(("Hello",), (None,), (None,), (0,))


@pytest.mark.parametrize("given", ["Hello cat", ids("Hello cat")])
def test_a_bos_that_the_server_adds_is_not_echoed(given: str | tuple[int, ...]) -> None:
    with_bos = replace(MODEL_INFO, bos=BOS, add_bos=True)
    result = build_whole(plan(with_bos, prompt=(given,), echo=True, logprobs=0), ids(" the"))
    assert result.text == "Hello cat the"
    assert result.logprobs == Logprobs(("Hello", " cat", " the"), (None, -0.5, -0.25), None, (0, 5, 9))


def test_an_empty_prompt_has_nothing_to_echo() -> None:
    result = build_whole(plan(prompt=("",), echo=True, logprobs=0), ids(" the"))
    assert (result.text, result.logprobs) == (" the", Logprobs((" the",), (-0.25,), None, (0,)))


def test_an_echo_of_bytes_spells_them_and_shows_their_text() -> None:
    result = build_whole(plan(prompt=("’😀漢",), echo=True, logprobs=0, max_tokens=0), ())
    assert result.text == "’😀漢"
    assert columns(result).tokens == (
        "bytes:\\xe2\\x80",
        "bytes:\\x99",
        "bytes:\\xf0\\x9f",
        "bytes:\\x98\\x80",
        "bytes:\\xe6",
        "bytes:\\xbc",
        "bytes:\\xa2",
    )
    assert columns(result).text_offset == (0, 0, 1, 1, 2, 2, 2)


def test_an_echo_of_broken_bytes_keeps_later_offsets_right() -> None:
    result = build_whole(plan(prompt=((0xE2, *ids(" the")),), echo=True, logprobs=0), ids(" cat"))
    assert (result.text, columns(result).text_offset) == ("\ufffd the cat", (0, 1, 5))


@pytest.mark.parametrize(
    "text", ["Hello cat", " Hello", "  cat", " ", "\n cat", "</s>Hello cat", "Hello</s>cat", " </s>"]
)
def test_spaces_that_the_tokenizer_adds_are_not_echoed(text: str) -> None:
    spaced = replace(MODEL_INFO, space_prefix=True)
    result = build_whole(plan(spaced, prompt=(text,), echo=True, logprobs=0), ids(" the"))
    assert result.text == text + " the"
    assert "".join(columns(result).tokens) == result.text
    for token, offset in zip(columns(result).tokens, columns(result).text_offset, strict=True):
        assert result.text[offset:].startswith(token)


def test_token_ids_keep_their_spaces() -> None:
    given = (0xFF, *ids(" cat sat"))
    result = build_whole(
        plan(replace(MODEL_INFO, space_prefix=True), prompt=(given,), echo=True, logprobs=0), ids(" the")
    )
    assert (result.text, columns(result).text_offset) == ("\ufffd cat sat the", (0, 1, 5, 9))


def test_an_end_token_has_an_entry_only_where_the_prompt_is_echoed() -> None:
    tokens = (*ids(" the"), EOS)
    assert columns(build_whole(plan(prompt=("Hello",), logprobs=0), tokens, "stop")).tokens == (" the",)
    result = build_whole(plan(prompt=("Hello",), logprobs=0, echo=True), tokens, "stop")
    assert result.text == "Hello the"
    assert result.logprobs == Logprobs(("Hello", " the", "</s>"), (None, -0.25, report(EOS).logprob), None, (0, 5, 9))


# ---- the fold of the deltas


@pytest.mark.parametrize("end", ["stop", "length"])
@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 3])
def test_one_delta_at_the_end_equals_the_fold_of_many(end: FinishReason, echo: bool, logprobs: int | None) -> None:
    the_plan = plan(prompt=("Hello’",), echo=echo, logprobs=logprobs, stop=("worn",))
    tokens = (*ids(b"Hello world \xf0\x9f sat\xe2"), *((EOS,) if end == "stop" else ()))
    prompt = the_plan.prompts[0]
    wanted = prompt.job.prompt_alternatives
    scored = [report(token, wanted) for token in prompt.job.prompt[1:] if wanted is not None]
    choice = ChoiceBuilder(the_plan, prompt, make_echo(the_plan, prompt, scored), None)
    for token in tokens:
        choice.add(report(token, logprobs))
    choice.end(end)
    assert fold(choice.deltas(0)) == build_whole(the_plan, tokens, end)


# ---- extensions


def test_token_ids_contain_all_generated_tokens_including_hidden_ones() -> None:
    the_plan = plan(prompt=("a cat",), return_token_ids=True, stop=(" sat",))
    _, deltas = build(the_plan, ids("Hello the sat"))
    assert fold(deltas).token_ids == ids("Hello the sat")
    assert deltas[0].prompt is not None
    assert deltas[0].prompt.token_ids == ids("a cat")
    assert all(delta.prompt is None for delta in deltas[1:])
    _, deltas = build(plan(prompt=("a",), return_token_ids=True), (*ids("Hello"), EOS), "stop")
    assert fold(deltas).token_ids == (*ids("Hello"), EOS)


def test_prompt_logprobs_are_reported_by_token_id_with_ranks() -> None:
    the, cat, sat = ids(" the cat sat")
    result = build_whole(plan(prompt=((the, sat),), prompt_logprobs=2), ids("Hello"))
    assert result.prompt is not None
    assert result.prompt.token_ids is None
    first, second = result.prompt.logprobs or ()
    assert first is None
    assert second is not None
    assert [(token, entry.decoded_token) for token, entry in second.items()] == [
        (str(sat), " sat"), (str(the), " the"), (str(cat), " cat")
    ]  # fmt: skip
    assert [entry.rank for entry in second.values()] == [report(sat).rank, 1, 2]


def test_no_more_alternatives_are_shown_than_were_asked_for() -> None:
    result = build_whole(plan(prompt=(" the cat",), echo=True, logprobs=1, prompt_logprobs=3), ids("Hello"))
    top = columns(result).top_logprobs
    assert top is not None
    assert max(len(entry) for entry in top if entry) <= 2
    assert result.prompt is not None
    assert len((result.prompt.logprobs or ())[1] or ()) >= 3


def test_a_stop_string_ends_nothing_before_the_fewest_tokens() -> None:
    result = build_whole(plan(prompt=("a",), stop=(" cat",), min_tokens=3), ids(" cat the cat sat cat sat"))
    assert (result.text, result.finish) == (" cat the cat sat", "stop")


@pytest.mark.parametrize("min_tokens", range(7))
@pytest.mark.parametrize("text", ["aENDx", "ENDEND", "aEENDD", "xENDyEND", "EEEEND"])
def test_a_stop_string_that_is_complete_after_the_fewest_tokens_ends_the_text(text: str, min_tokens: int) -> None:
    result = build_whole(plan(prompt=("a",), stop=("END",), min_tokens=min_tokens), text.encode())
    complete = [end for end in range(min_tokens + 1, len(text) + 1) if text[:end].endswith("END")]
    assert (result.text, result.finish) == ((text[: complete[0] - 3], "stop") if complete else (text, "length"))


# ---- a character that starts in the prompt and ends in the completion

EMOJI = "😀".encode()


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("before", ["", "a", "é 漢"])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_a_character_cut_by_the_end_of_the_prompt_is_whole_in_the_echo(
    cut: int, before: str, logprobs: int | None
) -> None:
    prompt = (*before.encode(), *EMOJI[:cut])
    result = build_whole(plan(prompt=(prompt,), echo=True, logprobs=logprobs), (*EMOJI[cut:], *b" x"))
    assert result.text == f"{before}😀 x"
    if logprobs is not None:
        place = len(before)
        offsets = [place] * 4 + [place + 1, place + 2]
        assert list(columns(result).text_offset[len(before.encode()) :]) == offsets


@pytest.mark.parametrize("generated", [b"x", b"\x80x", b"\xf0\x9f\x98\x80", b"", b"\xff"])
@pytest.mark.parametrize("stop", [(), ("\ufffd",), ("x",)])
def test_a_cut_character_that_is_not_continued_becomes_one_replacement_character(
    generated: bytes, stop: tuple[str, ...]
) -> None:
    prompt = (*b"a", *EMOJI[:2])
    result = build_whole(plan(prompt=(prompt,), echo=True, logprobs=0, stop=stop), (*generated, EOS), "stop")
    expected = (b"a" + EMOJI[:2] + generated).decode("utf-8", "replace")
    if stop == ("x",):
        expected = expected.partition("x")[0]
    if stop != ("\ufffd",) or generated in (b"x", b""):
        assert result.text == expected
    assert all(0 <= offset <= len(result.text) for offset in columns(result).text_offset)
    assert result.text.startswith("a")


def test_a_prompt_that_ends_inside_a_character_can_be_scored_alone() -> None:
    result = build_whole(plan(prompt=((*b"a", *EMOJI[:2]),), echo=True, logprobs=0, max_tokens=0, stop=("\ufffd",)), ())
    assert (result.text, result.finish, columns(result).text_offset) == ("a\ufffd", "length", (0, 1, 1))


def test_without_echo_a_completion_starts_with_its_own_bytes() -> None:
    result = build_whole(plan(prompt=((*b"a", *EMOJI[:2]),), logprobs=0), (*EMOJI[2:], *b"x"))
    assert (result.text, columns(result).text_offset) == ("\ufffd\ufffdx", (2, 3, 4))


# ---- a tokenizer that drops bytes


def echoed(text: str, given: bytes, strip_space: bool = False, generated: bytes = b"x") -> Delta:
    """The echo of a text of which the tokenizer has kept these bytes, each as one token."""
    the_plan = plan(replace(MODEL_INFO, context=8192), prompt=(text,), echo=True, logprobs=0)
    prompt = the_plan.prompts[0]
    prompt = dataclasses.replace(prompt, job=replace(prompt.job, prompt=tuple(given)))
    the_plan = dataclasses.replace(the_plan, strip_space=strip_space)
    scored = [report(token, 0) for token in given[1:]]
    choice = ChoiceBuilder(the_plan, prompt, make_echo(the_plan, prompt, scored), None)
    for token in generated:
        choice.add(report(token, 0))
    choice.end("length")
    return fold(choice.deltas(0))


@pytest.mark.parametrize(
    ("text", "dropped"),
    [
        ("a\x04b", "\x04"),
        ("\x04ab", "\x04"),
        ("ab\x04", "\x04"),
        ("a\x04\x05é\x04😀\x05b", "\x04\x05"),
        ("é" + "\x04" * 5000 + "ab", "\x04"),
        ("\x04".join("abcdefgh" * 100), "\x04"),
        ("é漢" * 200 + "\x04b", "\x04"),
        ("\x04\x05", "\x04\x05"),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_offsets_fit_the_text_where_bytes_were_dropped(text: str, dropped: str) -> None:
    kept = text.translate(dict.fromkeys(map(ord, dropped)))
    result = echoed(text, kept.encode())
    assert result.text == text + "x"
    places = [place for place, letter in enumerate(text) if letter not in dropped for _ in letter.encode()]
    assert columns(result).text_offset == (*places, len(text))


@pytest.mark.parametrize("given", [b"Qa", b"QQQQ", b"aQb" * 400, bytes(range(65, 91)) * 40])
def test_offsets_of_tokens_that_are_not_in_the_text_stay_within_it(given: bytes) -> None:
    text = "abc" * 300
    offsets = columns(echoed(text, given)).text_offset
    assert list(offsets) == sorted(offsets)
    assert offsets[-1] == len(text)
    assert len(offsets) == len(given) + 1


# ---- large and many choices


def test_a_fold_of_many_deltas_has_every_entry() -> None:
    entries = [{"a": -1.0}] * 3
    parts = [Delta(0, "ab", Logprobs(("a",) * 3, (-1.0,) * 3, tuple(entries), (0, 1, 2)), None, 3)] * 20_000
    result = fold([*parts, Delta(0, "", Logprobs((), (), (), ()), "stop")])
    assert (len(result.text), result.completion_tokens, result.finish) == (40_000, 60_000, "stop")
    assert [len(column) for column in (columns(result).tokens, columns(result).top_logprobs or ())] == [60_000] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 255, 256, 257, 600])
def test_a_delta_folder_gives_the_same_as_one_fold(size: int) -> None:
    deltas = [Delta(3, f"{n} ", Logprobs((str(n),), (-1.0,), None, (n,)), None, 1, (n,)) for n in range(size)]
    folded = DeltaFolder()
    for delta in deltas:
        folded.add([delta])
    assert folded.result == fold(deltas)


def test_stop_strings_are_prepared_once_for_all_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    function = text_stream._failure_function
    monkeypatch.setattr(text_stream, "_failure_function", lambda stop: prepared.append(stop) or function(stop))
    stops = tuple(letter * 1023 for letter in "abcdefghijklmnop")
    the_plan = plan(prompt=("x",) * 50, n=1, stop=stops)
    choices = [ChoiceBuilder(the_plan, prompt, None, None) for prompt in the_plan.prompts for _ in range(20)]
    assert len(choices) == 1000
    assert sorted(prepared) == sorted(stops)
    for choice in choices[:3]:
        for token in b"ab" * 20:
            choice.add(report(token, 0))
        assert choice.finish is None


def test_echo_columns_and_report_entries_are_made_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    the_plan = plan(prompt=("a" * 40,), echo=True, logprobs=2, prompt_logprobs=2)
    scored = [report(token, 2) for token in the_plan.prompts[0].job.prompt[1:]]
    echo = make_echo(the_plan, the_plan.prompts[0], scored)
    prompt_report = make_report(the_plan, the_plan.prompts[0], scored)
    monkeypatch.setattr(logprobs, "SLICE_TOKENS", 8)
    assert echo is not None
    assert prompt_report is not None
    assert [len(part.tokens) for part in echo.columns()] == [8] * 5
    assert [len(part) for part in prompt_report.entries()] == [1, 8, 8, 8, 8, 7]
    assert join_columns(echo.columns()).text_offset == tuple(range(40))
