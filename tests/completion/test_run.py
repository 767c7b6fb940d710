"""A plan carried out: deltas as they come, then what was used; and what ends early."""

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
from afterword.engine.protocol import FinishReason, Job
from afterword.errors import AfterwordError, EngineDied, ModelReplaced, Overloaded, ReaderTooSlow
from scripted_engine import BOS, CARD, EOS, INFILL, Script, ScriptedEngine, ids, report, says

Items = list[Delta | Usage]


async def planned(engine: ScriptedEngine, fields: dict[str, Any]) -> Plan:
    request = CompletionRequest(**fields)
    return make_plan(request, engine.model_info, await tokenize(request, engine), 0)


async def collect(engine: ScriptedEngine, fields: dict[str, Any], items: Items) -> None:
    async with asyncio.timeout(5), aclosing(run(await planned(engine, fields), engine)) as stream:
        async for item in stream:
            items.append(item)


@dataclass
class Answer:
    """All that a run yielded."""

    items: Items

    @property
    def deltas(self) -> list[Delta]:
        return [item for item in self.items if isinstance(item, Delta)]

    @property
    def choices(self) -> list[Delta]:
        indexes = sorted({delta.index for delta in self.deltas})
        return [fold(delta for delta in self.deltas if delta.index == index) for index in indexes]

    @property
    def brief(self) -> list[tuple[int, str, FinishReason | None]]:
        return [(choice.index, choice.text, choice.finish) for choice in self.choices]

    @property
    def usage(self) -> tuple[int, int]:
        last = self.items[-1]
        assert isinstance(last, Usage)
        return last.prompt_tokens, last.completion_tokens


def ask(engine: ScriptedEngine | Script, **fields: Any) -> Answer:
    items: Items = []
    asyncio.run(collect(engine if isinstance(engine, ScriptedEngine) else ScriptedEngine(engine), fields, items))
    return Answer(items)


def fail(engine: ScriptedEngine, error: type[AfterwordError], **fields: Any) -> Answer:
    """What was yielded before the error."""
    items: Items = []
    with pytest.raises(error):
        asyncio.run(collect(engine, fields, items))
    return Answer(items)


# ---- one choice, several, and of several prompts


def test_an_answer_is_its_deltas_and_then_one_usage() -> None:
    assert ask(says("Hello world"), prompt=("a cat",)).items == [
        Delta(0, "Hello", None, None, 1),
        Delta(0, " world", None, None, 1),
        Delta(0, "", None, "stop"),
        Usage(prompt_tokens=2, completion_tokens=2),
    ]


def test_an_answer_ends_at_max_tokens() -> None:
    answer = ask(says("Hello world the cat sat"), prompt=("a",), max_tokens=3)
    assert (answer.brief, answer.usage) == ([(0, "Hello world the", "length")], (1, 3))


def test_choices_are_numbered_and_grow_side_by_side() -> None:
    answer = ask(says("Hello cat", " the world"), prompt=("a",), n=2)
    assert answer.brief == [(0, "Hello cat", "stop"), (1, " the world", "stop")]
    assert [delta.index for delta in answer.deltas] == [0, 1, 0, 1, 0, 1]


def by_prompt(texts: dict[str, str]) -> Callable[[Job, int], Any]:
    """A script by prompt: each sample says the prompt's text and its own number."""
    return lambda job, sample: (*ids(f"{texts[b''.join(CARD.pieces[t] for t in job.prompt).decode()]}{sample}"), EOS)


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    answer = ask(by_prompt({"a": "x", "b": "yyy"}), prompt=("a", "b"), n=2, echo=True, logprobs=0)
    assert [choice.text for choice in answer.choices] == ["ax0", "ax1", "byyy0", "byyy1"]
    assert all(choice.logprobs and choice.logprobs.text_offset[0] == 0 for choice in answer.choices)
    assert [sum(delta.finish is not None for delta in answer.deltas if delta.index == i) for i in range(4)] == [1] * 4


def test_the_last_delta_of_a_choice_is_the_one_that_finishes_it() -> None:
    answer = ask(by_prompt({"a": "x", "b": "yyy"}), prompt=("a", "b"), n=3)
    last = {delta.index: delta for delta in answer.deltas}
    assert all(delta.finish == "stop" for delta in last.values())
    assert [delta.index for delta in answer.deltas if delta.finish is not None] == [0, 1, 2, 3, 4, 5]


# ---- usage


def test_a_prompt_counts_once_and_every_choice_counts() -> None:
    assert ask(says("Hello", "Hello world"), prompt=("a cat", "b"), n=2).usage == (3, 6)


def test_candidates_that_are_not_returned_count_too() -> None:
    assert ask(says("Hello", "Hello world", ""), prompt=("a",), best_of=3).usage == (1, 3)


@pytest.mark.parametrize(
    ("text", "fields", "count"),
    [
        ("", {}, 0),
        ("Hello", {"echo": True, "logprobs": 0}, 1),  # neither the prompt nor the entry of the end token
        ("Hello, stop", {"stop": (", stop",)}, 1),
        ("Hello", {"max_tokens": 0, "echo": True, "logprobs": 0}, 0),
    ],
)
def test_only_tokens_of_the_answer_are_completion_tokens(text: str, fields: dict[str, Any], count: int) -> None:
    assert ask(says(text), prompt=("a cat",), **fields).usage == (2, count)


def test_tokens_that_the_server_adds_are_not_billed() -> None:
    model_info = replace(CARD, bos=BOS, add_bos=True, infill=INFILL)
    assert ask(ScriptedEngine(says(), model_info), prompt=("a", ""), suffix=" cat sat").usage == (5, 0)
    assert ask(ScriptedEngine(says(), model_info), prompt=(None, "a")).usage == (1, 0)


# ---- best_of

LIKELY, LIKELIER, LIKELIEST = " sat", " cat", " the"


def test_the_likeliest_candidates_are_returned_best_first() -> None:
    script = says(LIKELY, LIKELIEST, "x", LIKELIER)
    assert ask(script, prompt=("a",), n=2, best_of=4).brief == [(0, LIKELIEST, "stop"), (1, LIKELIER, "stop")]


def test_candidates_are_ranked_by_their_mean_not_by_their_length() -> None:
    script = says(LIKELIER * 2, LIKELIEST * 9)
    assert ask(script, prompt=("a",), best_of=2, max_tokens=9).brief == [(0, LIKELIEST * 9, "length")]


def test_the_end_token_is_part_of_a_candidates_mean() -> None:
    end = report(EOS).logprob or 0
    assert -0.75 > (-0.25 + end) / 2 > -1.75 > end
    script = says(LIKELIEST, LIKELY * 3, "")  # means of (-0.25 + end) / 2, of -0.75, and of the end alone
    assert ask(script, prompt=("a",), best_of=3, n=2, max_tokens=3).brief == [
        (0, LIKELY * 3, "length"),
        (1, LIKELIEST, "stop"),
    ]


def test_of_equal_candidates_the_earlier_is_better() -> None:
    script = says("\n", LIKELIEST + LIKELY, LIKELY + LIKELIEST)
    assert [choice.text for choice in ask(script, prompt=("a",), n=2, best_of=3, max_tokens=2).choices] == [
        LIKELIEST + LIKELY,
        LIKELY + LIKELIEST,
    ]


def test_choices_of_candidates_are_numbered_by_n() -> None:
    answer = ask(by_prompt({"a": "x", "b": "y"}), prompt=("a", "b"), n=2, best_of=4)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in answer.choices] == ["x", "x", "y", "y"]


def test_candidates_come_whole_with_echo_and_columns() -> None:
    answer = ask(says(LIKELY, LIKELIEST), prompt=("Hello",), best_of=2, echo=True, logprobs=0, max_tokens=1)
    assert [(delta.index, delta.text, delta.finish) for delta in answer.deltas] == [(0, "Hello the", "length")]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.token_logprobs == (None, -0.25)


def test_ranking_alone_shows_no_columns() -> None:
    assert ask(says(LIKELY, LIKELIEST), prompt=("a",), best_of=2).choices[0].logprobs is None


def test_candidates_of_no_length_are_all_alike() -> None:
    answer = ask(says(), prompt=("a cat",), best_of=3, n=2, max_tokens=0, echo=True, logprobs=0)
    assert answer.brief == [(0, "a cat", "length"), (1, "a cat", "length")]


# ---- scoring


def test_a_prompt_scored_in_parts_is_whole() -> None:
    prompt = "Hello cat sat the world"
    (choice,) = ask(says("x"), prompt=(prompt,), echo=True, logprobs=0, max_tokens=0).deltas
    assert (choice.text, choice.finish) == (prompt, "length")
    assert choice.logprobs is not None
    assert choice.logprobs.token_logprobs == (None, *(report(token).logprob for token in ids(prompt)[1:]))


def test_a_client_that_scores_gets_an_entry_for_each_token_it_asked_about() -> None:
    given = ids("Hello cat sat")
    for text in ("x", ""):  # a token more, or the end of the text
        answer = ask(says(text), prompt=(given,), echo=True, logprobs=1, max_tokens=1, temperature=0.0, seed=1234)
        columns = answer.choices[0].logprobs
        assert columns is not None
        assert {len(column) for column in (columns.tokens, columns.token_logprobs, columns.text_offset)} == {4}


# ---- early ends


def test_a_sample_is_dropped_when_a_stop_string_ends_it() -> None:
    engine = ScriptedEngine(says("Hello. cat sat the world", " cat cat cat"))
    answer = ask(engine, prompt=("a",), n=2, stop=(".",))
    assert answer.brief == [(0, "Hello", "stop"), (1, " cat cat cat", "stop")]
    assert [(job.dropped, job.closed) for job in engine.runs] == [([0], False)]


def test_a_run_ends_when_its_last_sample_is_dropped() -> None:
    engine = ScriptedEngine(lambda _, sample: ids("Hello.") * 100)
    assert ask(engine, prompt=("a", "b"), stop=(".",)).brief == [(0, "Hello", "stop"), (1, "Hello", "stop")]
    assert [job.dropped for job in engine.runs] == [[0], [0]]


def test_candidates_are_dropped_too() -> None:
    engine = ScriptedEngine(says(LIKELY + ". the end", LIKELIEST + ". the end"))
    answer = ask(engine, prompt=("a",), best_of=2, stop=(".",))
    assert answer.brief == [(0, LIKELIEST, "stop")]
    assert engine.runs[0].dropped == [0, 1]


@pytest.mark.parametrize("fields", [{}, {"best_of": 3, "n": 2}])
def test_what_an_engine_had_already_computed_is_ignored(fields: dict[str, Any]) -> None:
    fields = {"prompt": ("a",), "n": 2, "stop": (".",), "max_tokens": 9, "echo": True, "logprobs": 1} | fields
    script = says("Hello. cat sat", "Hello world. sat", " cat. cat")
    patient, hasty = ScriptedEngine(script), ScriptedEngine(script, hasty=True)
    answers = ask(patient, **fields), ask(hasty, **fields)
    assert answers[0].items == answers[1].items
    assert patient.runs[0].dropped
    assert not hasty.runs[0].dropped


def test_the_engine_is_told_when_nobody_listens_any_more() -> None:
    async def leave(engine: ScriptedEngine) -> None:
        async with aclosing(run(await planned(engine, {"prompt": ("a", "b"), "n": 2}), engine)) as items:
            await anext(items)

    engine = ScriptedEngine(says("Hello cat sat the world"))
    asyncio.run(leave(engine))
    assert [job.closed for job in engine.runs] == [True, True]


def test_the_engine_is_told_when_the_work_is_cancelled() -> None:
    async def cancel(engine: ScriptedEngine) -> None:
        items: Items = []
        task = asyncio.create_task(collect(engine, {"prompt": ("a",), "max_tokens": 60}, items))
        while not items:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    engine = ScriptedEngine(says("Hello" * 60))
    asyncio.run(cancel(engine))
    assert engine.runs[0].closed


def test_an_answer_that_is_whole_leaves_nothing_to_close() -> None:
    engine = ScriptedEngine(says("Hello"))
    ask(engine, prompt=("a", "b"), n=2)
    assert [(job.dropped, job.closed) for job in engine.runs] == [([], False)] * 2


# ---- failures


def test_deltas_before_a_failure_are_delivered_and_no_usage_after() -> None:
    engine = ScriptedEngine(says("Hello world the cat"), dies_after=2)
    assert fail(engine, EngineDied, prompt=("a",)).items == [
        Delta(0, "Hello", None, None, 1),
        Delta(0, " world", None, None, 1),
    ]


def test_a_failure_of_one_run_ends_the_others() -> None:
    engine = ScriptedEngine(by_prompt({"a": "", "b": "Hello world the cat"}), dies_after=3)
    fail(engine, EngineDied, prompt=("a", "b"))
    assert [bool(job.live) for job in engine.runs] == [False, False]
    assert engine.runs[1].closed


def test_candidates_are_not_ranked_after_a_failure() -> None:
    engine = ScriptedEngine(says("Hello", "Hello world the cat"), dies_after=3)
    assert fail(engine, EngineDied, prompt=("a",), best_of=2).items == []


def test_an_engine_without_room_says_so_before_the_first_delta() -> None:
    engine = ScriptedEngine(says("Hello"), room=1)
    assert fail(engine, Overloaded, prompt=("a", "b")).items == []
    assert [job.closed for job in engine.runs] == [True]


# ---- who pays for what


def told(engine: ScriptedEngine, deltas: int | None = None, **fields: Any) -> list[Usage]:
    """What is told of the cost of an answer, all of it or so many deltas."""

    async def listen() -> None:
        async with aclosing(run(await planned(engine, fields), engine, bills.append)) as items:
            async for count, _ in aenumerate(items):
                if count == deltas:
                    return

    bills: list[Usage] = []
    with suppress(AfterwordError):
        asyncio.run(listen())
    return bills


async def aenumerate(items: AsyncIterator[Any]) -> AsyncIterator[tuple[int, Any]]:
    count = 0
    async for item in items:
        count += 1
        yield count, item


def test_a_whole_answer_of_its_whole_length_costs_its_usage() -> None:
    fields: dict[str, Any] = {"prompt": ("a", "bc"), "n": 2, "max_tokens": 2}
    answer = ask(says("Hello world cat", "Hello world"), **fields)
    assert told(ScriptedEngine(says("Hello world cat", "Hello world")), **fields) == [answer.items[-1]]


@pytest.mark.parametrize(
    ("fields", "used", "generated"),
    [
        ({"prompt": ("a",)}, 5, 6),  # the end token
        ({"prompt": ("a",), "stop": ("Hello world the cat",)}, 0, 4),  # all of the text
        ({"prompt": ("a",), "stop": (" the",)}, 2, 3),
        ({"prompt": ("a",), "stop": (" sat?",)}, 5, 6),  # held back, then shown
        ({"prompt": ("a", "b"), "stop": ("Hello world",), "n": 2}, 0, 8),
        # Candidates that are not given; each generates one token more before it is dropped.
        ({"prompt": ("a",), "stop": ("Hello world",), "best_of": 3, "n": 1}, 0, 9),
        ({"prompt": ("a",), "max_tokens": 0, "echo": True, "logprobs": 0}, 0, 0),
    ],
    ids=str,
)
def test_all_that_was_generated_is_charged_and_the_usage_is_of_the_text(
    fields: dict[str, Any], used: int, generated: int
) -> None:
    script = says(*["Hello world the cat sat"] * 3)
    assert ask(script, **fields).usage[1] == used
    (account,) = told(ScriptedEngine(script), **fields)
    assert account.completion_tokens == generated


def test_samples_that_are_dropped_late_are_charged_to_their_end() -> None:
    engine = ScriptedEngine(says("Hello world the cat sat"), hasty=True)  # it goes on until it hears of the drop
    (account,) = told(engine, prompt=("a",), stop=("Hello",))
    assert account.completion_tokens > 1
    assert ask(says("Hello world the cat sat"), prompt=("a",), stop=("Hello",)).usage == (1, 0)


@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1, "best_of": 2}], ids=str)
def test_who_leaves_and_whose_engine_dies_pay_for_what_was_computed(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine(says("Hello world the cat", "Hello world the cat"), dies_after=2)
    assert told(engine, prompt=("a",), **fields) == [Usage(1, 4)]


def test_a_prompt_whose_turn_never_came_costs_nothing() -> None:
    engine = ScriptedEngine(says("Hello world"), room=1)
    assert told(engine, prompt=("a", "b")) == [Usage(0, 0)]


def test_who_leaves_early_pays_for_less() -> None:
    (usage,) = told(ScriptedEngine(says("Hello world the cat sat")), 2, prompt=("a",))
    assert usage.prompt_tokens == 1
    assert 2 <= usage.completion_tokens < 5, "the engine may be ahead"


def test_what_was_computed_and_never_read_is_paid_for() -> None:
    async def read_nothing() -> None:
        async with aclosing(run(await planned(engine, {"prompt": ("a",)}), engine, bills.append)) as items:
            await anext(items)
            while engine.runs[0].live:
                await asyncio.sleep(0)

    bills: list[Usage] = []
    engine = ScriptedEngine(says("Hello world the cat"))
    asyncio.run(read_nothing())
    assert bills == [Usage(1, 5)]


# ---- one path


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("stop", [(), ("ld t",), ("nothing",)])
def test_what_comes_at_once_is_the_sum_of_what_comes_in_deltas(
    echo: bool, logprobs: int | None, stop: tuple[str, ...]
) -> None:
    fields = {"prompt": ("Hello 😀",), "echo": echo, "logprobs": logprobs, "stop": stop, "max_tokens": 9}
    text = "Hello world the 😀 ".encode() + b"\xf0\x9f"
    script = says(text, text)
    (streamed,) = ask(script, **fields).choices
    (at_once,) = ask(script, **fields, best_of=2).deltas
    assert at_once == streamed


# ---- a reader that is behind


def test_many_scored_prompts_may_come_faster_than_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is paused, and goes on when the reader has caught up: no answer fails for its size."""
    monkeypatch.setattr("afterword.completion.run.MAX_UNREAD_BYTES", 3000)
    engine = ScriptedEngine(says("Hello"), hasty=True)
    prompts = ("Hello world", "the cat sat", "a" * 30) * 4
    answer = ask(engine, prompt=prompts, echo=True, logprobs=3, max_tokens=5)
    assert [choice.finish for choice in answer.choices] == ["stop"] * 12
    assert all(each.pauses for each in engine.runs)


async def slowly(engine: ScriptedEngine, seconds: float, items: Items) -> None:
    plan = await planned(engine, {"prompt": ("a",), "max_tokens": 40, "logprobs": 3, "n": 2})
    async with asyncio.timeout(5), aclosing(run(plan, engine)) as stream:
        async for item in stream:
            items.append(item)
            await asyncio.sleep(seconds if len(items) == 1 else 0)


def test_a_reader_that_pauses_gets_all_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("afterword.completion.run.MAX_UNREAD_BYTES", 4000)
    engine, items = ScriptedEngine(lambda *_: ids("x" * 99)), []
    asyncio.run(slowly(engine, 0.05, items))
    assert engine.runs[0].pauses > 0
    assert sum(item.completion_tokens for item in items if isinstance(item, Delta)) == 80


def test_a_reader_that_pauses_too_long_gets_what_there_is_and_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("afterword.completion.run.MAX_UNREAD_BYTES", 4000)
    monkeypatch.setattr("afterword.completion.run.READER_SECONDS", 0.01)
    engine, items = ScriptedEngine(lambda *_: ids("x" * 99)), []
    with pytest.raises(ReaderTooSlow) as caught:
        asyncio.run(slowly(engine, 0.1, items))
    assert caught.value.status == 408
    assert engine.runs[0].closed
    assert 2 < len(items) < 60


OTHER = replace(CARD, fingerprint="fp_1")


@pytest.mark.parametrize("fields", [{"prompt": ("Hello",)}, {"prompt": ((65, 66),)}, {"prompt": ("Hello", " cat")}])
def test_a_plan_for_another_model_is_not_carried_out(fields: dict[str, Any]) -> None:
    async def test() -> None:
        engine = ScriptedEngine(says("x"))
        plan = await planned(engine, fields)
        engine.model_info = OTHER
        with pytest.raises(ModelReplaced):
            async for _ in run(plan, engine):
                pass
        assert not engine.runs

    asyncio.run(test())


def test_texts_of_one_request_are_of_one_model() -> None:
    class Changing(ScriptedEngine):
        async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
            self.model_info = OTHER
            return await super().tokenize(text, special, client)

    with pytest.raises(ModelReplaced):
        asyncio.run(tokenize(CompletionRequest(prompt=("Hello", " cat")), Changing(says("x"))))
