"""`run`: deltas, then the usage; dropped samples, closed runs, errors, charges, and readers that are too slow."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

import pytest
from msgspec.structs import replace

from afterword.completion.choice import Delta, fold
from afterword.completion.plan import Plan, make_plan
from afterword.completion.request import CompletionRequest
from afterword.completion.run import Usage, run, tokenize
from afterword.completion.step_queue import Reader
from afterword.engine.protocol import FinishReason, Job
from afterword.errors import AfterwordError, ModelReplaced, Overloaded, ReaderTooSlow, WorkerDied
from scripted_engine import (
    BOS,
    EOS,
    INFILL,
    MID,
    MODEL_INFO,
    PIECES,
    PRE,
    SUF,
    Script,
    ScriptedEngine,
    ids,
    report,
    text_script,
)
from sim.virtual import run as run_virtually

Items = list[Delta | Usage]


async def planned(engine: ScriptedEngine, fields: dict[str, Any]) -> Plan:
    request = CompletionRequest(**fields)
    return make_plan(request, engine.model_info, await tokenize(request, engine), 0)


async def collect(engine: ScriptedEngine, fields: dict[str, Any], items: Items) -> None:
    async with asyncio.timeout(5), aclosing(run(await planned(engine, fields), engine)) as stream:
        async for item in stream:
            items.append(item)


@dataclass
class Result:
    """Everything that a run yielded."""

    items: Items

    @property
    def deltas(self) -> list[Delta]:
        return [item for item in self.items if isinstance(item, Delta)]

    @property
    def choices(self) -> list[Delta]:
        indexes = sorted({delta.index for delta in self.deltas})
        return [fold(delta for delta in self.deltas if delta.index == index) for index in indexes]

    @property
    def summary(self) -> list[tuple[int, str, FinishReason | None]]:
        return [(choice.index, choice.text, choice.finish) for choice in self.choices]

    @property
    def usage(self) -> tuple[int, int]:
        last = self.items[-1]
        assert isinstance(last, Usage)
        return last.prompt_tokens, last.completion_tokens


def complete(engine: ScriptedEngine | Script, **fields: Any) -> Result:
    items: Items = []
    asyncio.run(collect(engine if isinstance(engine, ScriptedEngine) else ScriptedEngine(engine), fields, items))
    return Result(items)


def complete_until_error(engine: ScriptedEngine, error: type[AfterwordError], **fields: Any) -> Result:
    """Everything that a run yielded before this error."""
    items: Items = []
    with pytest.raises(error):
        asyncio.run(collect(engine, fields, items))
    return Result(items)


# ---- one choice, several choices, several prompts


def test_a_run_yields_deltas_and_then_one_usage() -> None:
    assert complete(text_script("Hello world"), prompt=("a cat",)).items == [
        Delta(0, "Hello", None, None, 1),
        Delta(0, " world", None, None, 1),
        Delta(0, "", None, "stop"),
        Usage(prompt_tokens=2, completion_tokens=2),
    ]


def test_a_choice_ends_at_max_tokens() -> None:
    result = complete(text_script("Hello world the cat sat"), prompt=("a",), max_tokens=3)
    assert (result.summary, result.usage) == ([(0, "Hello world the", "length")], (1, 3))


def test_choices_are_numbered_and_generated_together() -> None:
    result = complete(text_script("Hello cat", " the world"), prompt=("a",), n=2)
    assert result.summary == [(0, "Hello cat", "stop"), (1, " the world", "stop")]
    assert [delta.index for delta in result.deltas] == [0, 1, 0, 1, 0, 1]


def by_prompt(texts: dict[str, str]) -> Callable[[Job, int], Any]:
    """A script in which each sample gives the text for its prompt and then its own number."""
    return lambda job, sample: (*ids(f"{texts[b''.join(PIECES[t] for t in job.prompt).decode()]}{sample}"), EOS)


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    result = complete(by_prompt({"a": "x", "b": "yyy"}), prompt=("a", "b"), n=2, echo=True, logprobs=0)
    assert [choice.text for choice in result.choices] == ["ax0", "ax1", "byyy0", "byyy1"]
    assert all(choice.logprobs and choice.logprobs.text_offset[0] == 0 for choice in result.choices)
    assert [sum(delta.finish is not None for delta in result.deltas if delta.index == i) for i in range(4)] == [1] * 4


def test_the_last_delta_of_a_choice_is_the_one_that_finishes_it() -> None:
    result = complete(by_prompt({"a": "x", "b": "yyy"}), prompt=("a", "b"), n=3)
    last = {delta.index: delta for delta in result.deltas}
    assert all(delta.finish == "stop" for delta in last.values())
    assert [delta.index for delta in result.deltas if delta.finish is not None] == [0, 1, 2, 3, 4, 5]


# ---- usage


def test_a_prompt_counts_once_and_every_choice_counts() -> None:
    assert complete(text_script("Hello", "Hello world"), prompt=("a cat", "b"), n=2).usage == (3, 6)


def test_candidates_that_are_not_returned_count_too() -> None:
    assert complete(text_script("Hello", "Hello world", ""), prompt=("a",), best_of=3).usage == (1, 3)


@pytest.mark.parametrize(
    ("text", "fields", "count"),
    [
        ("", {}, 0),
        ("Hello", {"echo": True, "logprobs": 0}, 1),  # without the prompt and without the entry of the end token
        ("Hello, stop", {"stop": (", stop",)}, 1),
        ("Hello", {"max_tokens": 0, "echo": True, "logprobs": 0}, 0),
    ],
)
def test_only_tokens_of_the_text_are_completion_tokens(text: str, fields: dict[str, Any], count: int) -> None:
    assert complete(text_script(text), prompt=("a cat",), **fields).usage == (2, count)


def test_tokens_that_the_server_adds_are_not_billed() -> None:
    model_info = replace(MODEL_INFO, bos=BOS, add_bos=True, infill=INFILL)
    assert complete(ScriptedEngine(text_script(), model_info), prompt=("a", ""), suffix=" cat sat").usage == (5, 0)
    assert complete(ScriptedEngine(text_script(), model_info), prompt=(None, "a")).usage == (1, 0)


def test_the_suffix_has_no_space_that_the_tokenizer_puts_before_a_text() -> None:
    engine = ScriptedEngine(text_script("!"), replace(MODEL_INFO, space_prefix=True, infill=INFILL))
    complete(engine, prompt=("cat",), suffix="the cat")
    assert engine.jobs[-1].job.prompt == (PRE, *ids(" cat"), SUF, *ids("the cat"), MID)


# ---- best_of

LIKELY, LIKELIER, LIKELIEST = " sat", " cat", " the"


def test_the_likeliest_candidates_are_returned_best_first() -> None:
    script = text_script(LIKELY, LIKELIEST, "x", LIKELIER)
    assert complete(script, prompt=("a",), n=2, best_of=4).summary == [(0, LIKELIEST, "stop"), (1, LIKELIER, "stop")]


def test_candidates_are_ranked_by_their_mean_not_by_their_length() -> None:
    script = text_script(LIKELIER * 2, LIKELIEST * 9)
    assert complete(script, prompt=("a",), best_of=2, max_tokens=9).summary == [(0, LIKELIEST * 9, "length")]


def test_the_end_token_is_part_of_a_candidates_mean() -> None:
    end = report(EOS).logprob or 0
    assert -0.75 > (-0.25 + end) / 2 > -1.75 > end
    script = text_script(LIKELIEST, LIKELY * 3, "")  # the means are (-0.25 + end) / 2, -0.75, and end
    assert complete(script, prompt=("a",), best_of=3, n=2, max_tokens=3).summary == [
        (0, LIKELY * 3, "length"),
        (1, LIKELIEST, "stop"),
    ]


def test_of_equal_candidates_the_earlier_comes_first() -> None:
    script = text_script("\n", LIKELIEST + LIKELY, LIKELY + LIKELIEST)
    assert [choice.text for choice in complete(script, prompt=("a",), n=2, best_of=3, max_tokens=2).choices] == [
        LIKELIEST + LIKELY,
        LIKELY + LIKELIEST,
    ]


def test_choices_of_candidates_are_numbered_by_n() -> None:
    result = complete(by_prompt({"a": "x", "b": "y"}), prompt=("a", "b"), n=2, best_of=4)
    assert [choice.index for choice in result.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in result.choices] == ["x", "x", "y", "y"]


def test_each_candidate_is_one_delta_with_echo_and_columns() -> None:
    result = complete(text_script(LIKELY, LIKELIEST), prompt=("Hello",), best_of=2, echo=True, logprobs=0, max_tokens=1)
    assert [(delta.index, delta.text, delta.finish) for delta in result.deltas] == [(0, "Hello the", "length")]
    assert result.choices[0].logprobs is not None
    assert result.choices[0].logprobs.token_logprobs == (None, -0.25)


def test_ranking_alone_shows_no_columns() -> None:
    assert complete(text_script(LIKELY, LIKELIEST), prompt=("a",), best_of=2).choices[0].logprobs is None


def test_candidates_without_tokens_are_equal() -> None:
    result = complete(text_script(), prompt=("a cat",), best_of=3, n=2, max_tokens=0, echo=True, logprobs=0)
    assert result.summary == [(0, "a cat", "length"), (1, "a cat", "length")]


# ---- scoring


def test_a_prompt_scored_in_parts_is_whole() -> None:
    prompt = "Hello cat sat the world"
    (choice,) = complete(text_script("x"), prompt=(prompt,), echo=True, logprobs=0, max_tokens=0).deltas
    assert (choice.text, choice.finish) == (prompt, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == (None, *(report(token).logprob for token in ids(prompt)[1:]))


def test_a_scoring_client_gets_an_entry_for_each_token_and_one_more() -> None:
    given = ids("Hello cat sat")
    for text in ("x", ""):  # one more token, or the end token
        result = complete(
            text_script(text), prompt=(given,), echo=True, logprobs=1, max_tokens=1, temperature=0.0, seed=1234
        )
        columns = result.choices[0].logprobs
        assert columns is not None
        assert {len(column) for column in (columns.tokens, columns.token_logprobs, columns.text_offset)} == {4}


# ---- runs that end early


def test_a_sample_is_dropped_when_a_stop_string_ends_it() -> None:
    engine = ScriptedEngine(text_script("Hello. cat sat the world", " cat cat cat"))
    result = complete(engine, prompt=("a",), n=2, stop=(".",))
    assert result.summary == [(0, "Hello", "stop"), (1, " cat cat cat", "stop")]
    assert [(job.dropped, job.closed) for job in engine.jobs] == [([0], False)]


def test_a_run_ends_when_its_last_sample_is_dropped() -> None:
    engine = ScriptedEngine(lambda _, sample: ids("Hello.") * 100)
    assert complete(engine, prompt=("a", "b"), stop=(".",)).summary == [(0, "Hello", "stop"), (1, "Hello", "stop")]
    assert [job.dropped for job in engine.jobs] == [[0], [0]]


def test_candidates_are_dropped_too() -> None:
    engine = ScriptedEngine(text_script(LIKELY + ". the end", LIKELIEST + ". the end"))
    result = complete(engine, prompt=("a",), best_of=2, stop=(".",))
    assert result.summary == [(0, LIKELIEST, "stop")]
    assert engine.jobs[0].dropped == [0, 1]


def test_a_choice_of_which_the_reader_needs_no_more_is_dropped() -> None:
    async def read(engine: ScriptedEngine) -> Items:
        plan = await planned(engine, {"prompt": ("a", "b"), "n": 2})
        read: Items = []

        def is_over(index: int) -> bool:
            return index == 3 and any(isinstance(item, Delta) and item.index == 3 for item in read)

        async with asyncio.timeout(5), aclosing(run(plan, engine, reader=Reader(is_over))) as items:
            async for item in items:
                read.append(item)
        return read

    engine = ScriptedEngine(text_script(*["Hello cat sat the world"] * 2))
    result = Result(asyncio.run(read(engine)))
    assert [job.dropped for job in engine.jobs] == [[], [1]]
    assert result.summary[:3] == [(index, "Hello cat sat the world", "stop") for index in range(3)]
    assert result.choices[3].finish is None
    assert result.usage[1] < 4 * 5


@pytest.mark.parametrize("fields", [{}, {"best_of": 3, "n": 2}])
def test_steps_after_the_end_of_a_sample_are_ignored(fields: dict[str, Any]) -> None:
    fields = {"prompt": ("a",), "n": 2, "stop": (".",), "max_tokens": 9, "echo": True, "logprobs": 1} | fields
    script = text_script("Hello. cat sat", "Hello world. sat", " cat. cat")
    yielding, not_yielding = ScriptedEngine(script), ScriptedEngine(script, yields=False)
    results = complete(yielding, **fields), complete(not_yielding, **fields)
    assert results[0].items == results[1].items
    assert yielding.jobs[0].dropped
    assert not not_yielding.jobs[0].dropped


def test_closing_the_iterator_closes_the_jobs() -> None:
    async def leave(engine: ScriptedEngine) -> None:
        async with aclosing(run(await planned(engine, {"prompt": ("a", "b"), "n": 2}), engine)) as items:
            await anext(items)

    engine = ScriptedEngine(text_script("Hello cat sat the world"))
    asyncio.run(leave(engine))
    assert [job.closed for job in engine.jobs] == [True, True]


def test_cancelling_the_task_closes_the_jobs() -> None:
    async def cancel(engine: ScriptedEngine) -> None:
        items: Items = []
        task = asyncio.create_task(collect(engine, {"prompt": ("a",), "max_tokens": 60}, items))
        while not items:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    engine = ScriptedEngine(text_script("Hello" * 60))
    asyncio.run(cancel(engine))
    assert engine.jobs[0].closed


def test_a_complete_run_leaves_no_job_to_close() -> None:
    engine = ScriptedEngine(text_script("Hello"))
    complete(engine, prompt=("a", "b"), n=2)
    assert [(job.dropped, job.closed) for job in engine.jobs] == [([], False)] * 2


# ---- errors


def test_deltas_before_an_error_are_yielded_and_no_usage_after_it() -> None:
    engine = ScriptedEngine(text_script("Hello world the cat"), dies_after=2)
    assert complete_until_error(engine, WorkerDied, prompt=("a",)).items == [
        Delta(0, "Hello", None, None, 1),
        Delta(0, " world", None, None, 1),
    ]


def test_an_error_of_one_job_ends_the_others() -> None:
    engine = ScriptedEngine(by_prompt({"a": "", "b": "Hello world the cat"}), dies_after=3)
    complete_until_error(engine, WorkerDied, prompt=("a", "b"))
    assert [bool(job.live) for job in engine.jobs] == [False, False]
    assert engine.jobs[1].closed


def test_candidates_are_not_yielded_after_an_error() -> None:
    engine = ScriptedEngine(text_script("Hello", "Hello world the cat"), dies_after=3)
    assert complete_until_error(engine, WorkerDied, prompt=("a",), best_of=2).items == []


def test_an_overloaded_engine_raises_before_the_first_delta() -> None:
    engine = ScriptedEngine(text_script("Hello"), max_jobs=1)
    assert complete_until_error(engine, Overloaded, prompt=("a", "b")).items == []
    assert [job.closed for job in engine.jobs] == [True]


# ---- charges


def recorded_usage(engine: ScriptedEngine, deltas: int | None = None, **fields: Any) -> list[Usage]:
    """The usages that `run` records for a request, if all items or only the first `deltas` items are read."""

    async def read() -> None:
        async with aclosing(run(await planned(engine, fields), engine, recorded.append)) as items:
            async for count, _ in aenumerate(items):
                if count == deltas:
                    return

    recorded: list[Usage] = []
    with suppress(AfterwordError):
        asyncio.run(read())
    return recorded


async def aenumerate(items: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    count = 0
    async for item in items:
        count += 1
        yield count, item


def test_recorded_usage_of_a_run_to_max_tokens_equals_its_usage() -> None:
    fields: dict[str, Any] = {"prompt": ("a", "bc"), "n": 2, "max_tokens": 2}
    result = complete(text_script("Hello world cat", "Hello world"), **fields)
    assert recorded_usage(ScriptedEngine(text_script("Hello world cat", "Hello world")), **fields) == [result.items[-1]]


@pytest.mark.parametrize(
    ("fields", "used", "generated"),
    [
        ({"prompt": ("a",)}, 5, 6),  # with the end token
        ({"prompt": ("a",), "stop": ("Hello world the cat",)}, 0, 4),  # the stop string is the whole text
        ({"prompt": ("a",), "stop": (" the",)}, 2, 3),
        ({"prompt": ("a",), "stop": (" sat?",)}, 5, 6),  # text held back, then released
        ({"prompt": ("a", "b"), "stop": ("Hello world",), "n": 2}, 0, 8),
        # Unreturned candidates count. Each generates one more token before it is dropped.
        ({"prompt": ("a",), "stop": ("Hello world",), "best_of": 3, "n": 1}, 0, 9),
        ({"prompt": ("a",), "max_tokens": 0, "echo": True, "logprobs": 0}, 0, 0),
    ],
    ids=str,
)
def test_all_that_was_generated_is_charged_and_the_usage_is_of_the_text(
    fields: dict[str, Any], used: int, generated: int
) -> None:
    script = text_script(*["Hello world the cat sat"] * 3)
    assert complete(script, **fields).usage[1] == used
    (account,) = recorded_usage(ScriptedEngine(script), **fields)
    assert account.completion_tokens == generated


@pytest.mark.parametrize("tokens", [2, 5, 40])
@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True},
        {"stop": ("cat",)},
        {"n": 3, "stream": True},
        {"n": 2, "best_of": 3},
        {"logprobs": 1, "echo": True, "stream": True},
        {"max_tokens": 3, "stream": True},
    ],
    ids=str,
)
def test_several_tokens_in_a_step_are_taken_one_by_one(fields: dict[str, Any], tokens: int) -> None:
    script = text_script("Hello world the cat sat", "the cat", " world Hello Hello Hello world")
    alone = complete(script, prompt=("a",), **fields)
    together = complete(ScriptedEngine(script, tokens_per_step=tokens), prompt=("a",), **fields)
    assert sorted(map(repr, together.items)) == sorted(map(repr, alone.items))


@pytest.mark.parametrize("tokens", [2, 5, 40])
@pytest.mark.parametrize(
    "fields", [{}, {"n": 3}, {"logprobs": 1, "echo": True}, {"max_tokens": 3}, {"return_token_ids": True}], ids=str
)
def test_the_tokens_of_a_step_are_one_delta_of_a_whole_response(fields: dict[str, Any], tokens: int) -> None:
    script = text_script("Hello world the cat sat", "the cat", " world Hello Hello Hello world")
    engine = ScriptedEngine(script, tokens_per_step=tokens)
    alone = complete(script, prompt=("a",), **fields)
    together = complete(engine, prompt=("a",), **fields)
    assert engine.jobs[0].job.whole
    assert (together.choices, together.usage) == (alone.choices, alone.usage)
    assert len(together.deltas) < len(alone.deltas)
    assert recorded_usage(engine, prompt=("a",), **fields) == recorded_usage(
        ScriptedEngine(script), prompt=("a",), **fields
    )


def test_tokens_after_a_stop_string_in_a_step_are_not_charged() -> None:
    engine = ScriptedEngine(text_script("Hello world the cat sat"), tokens_per_step=5)
    (account,) = recorded_usage(engine, prompt=("a",), stop=("world",))
    assert account.completion_tokens == 2


def test_tokens_that_were_taken_back_are_charged_and_not_in_the_usage() -> None:
    engine = ScriptedEngine(text_script("Hello world the cat sat"), taken_back=7)
    result = complete(engine, prompt=("a",), max_tokens=3)
    (account,) = recorded_usage(engine, prompt=("a",), max_tokens=3)
    assert (result.usage[1], account.completion_tokens) == (3, 10)


def test_usage_counts_the_tokens_of_a_prediction() -> None:
    info = replace(MODEL_INFO, verifies_drafts=True)
    text = "Hello world the cat sat the cat sat Hello world"
    for prediction, accepted, rejected in [
        (text, 11, 0),
        ("the the the the", 0, 0),
        (text.replace("sat Hello", "sat world"), 8, 2),
    ]:
        engine = ScriptedEngine(text_script(text), model_info=info, tokens_per_step=3)
        (account,) = recorded_usage(engine, prompt=("a",), prediction=prediction)
        assert (account.predicted.accepted, account.predicted.rejected) == (accepted, rejected), prediction
        assert account.completion_tokens == 12
    engine = ScriptedEngine(text_script(text))
    (account,) = recorded_usage(engine, prompt=("a",), prediction=text)
    assert account.predicted.accepted == 0
    assert engine.jobs[0].job.prediction == ()


def test_tokens_generated_before_a_late_drop_are_charged() -> None:
    engine = ScriptedEngine(text_script("Hello world the cat sat"), yields=False)  # it drops samples late
    (account,) = recorded_usage(engine, prompt=("a",), stop=("Hello",))
    assert account.completion_tokens > 1
    assert complete(text_script("Hello world the cat sat"), prompt=("a",), stop=("Hello",)).usage == (1, 0)


@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1, "best_of": 2}], ids=str)
def test_computed_tokens_are_charged_when_the_engine_dies(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine(text_script("Hello world the cat", "Hello world the cat"), dies_after=2)
    assert recorded_usage(engine, prompt=("a",), **fields) == [Usage(1, 4)]


def test_a_prompt_without_a_step_is_not_charged() -> None:
    engine = ScriptedEngine(text_script("Hello world"), max_jobs=1)
    assert recorded_usage(engine, prompt=("a", "b")) == [Usage(0, 0)]


def test_a_client_that_disconnects_early_is_charged_for_less() -> None:
    (usage,) = recorded_usage(ScriptedEngine(text_script("Hello world the cat sat")), 2, prompt=("a",))
    assert usage.prompt_tokens == 1
    assert 2 <= usage.completion_tokens < 5, "the engine may be ahead"


def test_who_leaves_a_merged_response_is_charged_for_the_tokens_that_were_reported() -> None:
    """Those after the last report may be computed, but the engine has not told of them."""
    engine = ScriptedEngine(text_script(" cat" * 60, " sat" * 60), tokens_per_step=16)
    (usage,) = recorded_usage(engine, 2, prompt=("a",), max_tokens=60, n=2, stream=False)
    assert engine.jobs[0].job.whole
    assert engine.jobs[0].closed
    assert usage.prompt_tokens == 1
    assert usage.completion_tokens == 2 * 16


def test_computed_tokens_that_were_never_read_are_charged() -> None:
    async def read_nothing() -> None:
        async with aclosing(run(await planned(engine, {"prompt": ("a",)}), engine, recorded.append)) as items:
            await anext(items)
            while engine.jobs[0].live:
                await asyncio.sleep(0)

    recorded: list[Usage] = []
    engine = ScriptedEngine(text_script("Hello world the cat"))
    asyncio.run(read_nothing())
    assert recorded == [Usage(1, 5)]


# ---- streamed and whole choices


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("stop", [(), ("ld t",), ("nothing",)])
def test_a_candidate_in_one_delta_equals_the_fold_of_streamed_deltas(
    echo: bool, logprobs: int | None, stop: tuple[str, ...]
) -> None:
    fields = {"prompt": ("Hello 😀",), "echo": echo, "logprobs": logprobs, "stop": stop, "max_tokens": 9}
    text = "Hello world the 😀 ".encode() + b"\xf0\x9f"
    script = text_script(text, text)
    (streamed,) = complete(script, **fields).choices
    (at_once,) = complete(script, **fields, best_of=2).deltas
    assert at_once == streamed


# ---- slow readers


def test_scores_that_arrive_faster_than_they_are_read_pause_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine resumes when the reader has caught up, so no response fails because of its size."""
    monkeypatch.setattr("afterword.completion.step_queue.MAX_UNREAD_BYTES", 3000)
    engine = ScriptedEngine(text_script("Hello"), yields=False)
    prompts = ("Hello world", "the cat sat", "a" * 30) * 4
    result = complete(engine, prompt=prompts, echo=True, logprobs=3, max_tokens=5)
    assert [choice.finish for choice in result.choices] == ["stop"] * 12
    assert all(each.pauses for each in engine.jobs)


async def read_slowly(engine: ScriptedEngine, items: Items, *, seconds: float, sent: int = 0, busy: float = 0) -> None:
    """Read all items. Before the second one the server is busy for `busy` seconds.

    After that its client takes `sent` bytes in each of 10 times `seconds`.
    """
    plan = await planned(engine, {"prompt": ("a",), "max_tokens": 40, "logprobs": 3, "n": 2})
    reader = Reader()
    async with aclosing(run(plan, engine, reader=reader)) as stream:
        async for item in stream:
            items.append(item)
            await asyncio.sleep(busy if len(items) == 1 else 0)
            for _ in range(10 if len(items) == 1 else 0):
                with reader.sending(sent):
                    await asyncio.sleep(seconds)


@pytest.mark.parametrize(
    "pace",
    [{"seconds": 5.5}, {"seconds": 55, "sent": 5 * 2**20}, {"seconds": 0, "busy": 900}],
    ids=str,
)
def test_a_reader_that_goes_on_or_waits_for_the_server_gets_all_deltas(
    monkeypatch: pytest.MonkeyPatch, pace: dict[str, Any]
) -> None:
    """Only a client that takes too little while the server waits for it is too slow."""
    monkeypatch.setattr("afterword.completion.step_queue.MAX_UNREAD_BYTES", 4000)
    engine, items = ScriptedEngine(lambda *_: ids("x" * 99)), []
    run_virtually(read_slowly(engine, items, **pace))
    assert engine.jobs[0].pauses > 0
    assert sum(item.completion_tokens for item in items if isinstance(item, Delta)) == 80


@pytest.mark.parametrize(
    "pace", [{"seconds": 6.5}, {"seconds": 6.5, "busy": 900}, {"seconds": 55, "sent": 2**20}], ids=str
)
def test_a_reader_that_takes_too_little_gets_the_queued_deltas_and_an_error(
    monkeypatch: pytest.MonkeyPatch, pace: dict[str, Any]
) -> None:
    monkeypatch.setattr("afterword.completion.step_queue.MAX_UNREAD_BYTES", 4000)
    engine, items = ScriptedEngine(lambda *_: ids("x" * 99)), []
    with pytest.raises(ReaderTooSlow) as caught:
        run_virtually(read_slowly(engine, items, **pace))
    assert caught.value.status == 408
    assert engine.jobs[0].closed
    assert 2 < len(items) < 60


OTHER = replace(MODEL_INFO, fingerprint="fp_1")


@pytest.mark.parametrize("fields", [{"prompt": ("Hello",)}, {"prompt": ((65, 66),)}, {"prompt": ("Hello", " cat")}])
def test_a_plan_for_another_model_is_not_run(fields: dict[str, Any]) -> None:
    async def test() -> None:
        engine = ScriptedEngine(text_script("x"))
        plan = await planned(engine, fields)
        engine.model_info = OTHER
        with pytest.raises(ModelReplaced):
            async for _ in run(plan, engine):
                pass
        assert not engine.jobs

    asyncio.run(test())


def test_all_texts_of_a_request_are_tokenized_by_one_model() -> None:
    class Changing(ScriptedEngine):
        async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
            self.model_info = OTHER
            return await super().tokenize(text, special, client)

    with pytest.raises(ModelReplaced):
        asyncio.run(tokenize(CompletionRequest(prompt=("Hello", " cat")), Changing(text_script("x"))))
