"""Jobs with grammars in `EngineLoop`: alone and in a crowd, ends, errors, and crashes that they may cause."""

from __future__ import annotations

import random
import re
from collections import defaultdict

import msgspec
import numpy as np
import pytest
from history_runner import VOCABULARY, HistoryRunner, alone

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.core.grammar_keeper import GrammarKeeper
from afterword.engine.core.matcher import AllowedTokens, Busy, Matcher
from afterword.engine.grammar import grammar_threads
from afterword.engine.grammar.grammar_threads import GrammarThreads
from afterword.engine.protocol import BATCH_CLIENT, Grammar, Job, SamplerChain, Sampling, Step, Token

TEXTS = [b"", b"\xff<end>", *b'a b c d { } " : , [ ] 0 1 2 - ab 12 true null [[ ]] x'.split()]
assert len(TEXTS) == VOCABULARY
END = 1
LIST = Grammar("json", '{"type":"array","items":{"enum":[0,12,true]},"maxItems":4}', "json_schema")
PARTS = Grammar("regex", "(ab|a|12){2,9}", "grammar")
CHOICE = Grammar("choice", '["abx","true"]', "grammar")
GRAMMARS = [None, None, LIST, PARTS, CHOICE]
PATTERNS = {
    LIST.text: r"\[((0|12|true)(,(0|12|true)){0,3})?\]",
    PARTS.text: PARTS.text,
    CHOICE.text: "abx|true",
}


def job(grammar: Grammar | None, **fields: object) -> Job:
    first = Job((2, 3), 1, 40, Sampling(), (END,), b"k" * 16, grammar=grammar)
    return msgspec.structs.replace(first, **fields)


def new_loop(slots: int = 4, **rules: int) -> EngineLoop:
    loop = EngineLoop(HistoryRunner(slots, 8, **rules))  # type: ignore[arg-type]
    loop.use_grammars(GrammarThreads(TEXTS))
    return loop


def play(loop: EngineLoop, jobs: list[Job]) -> list[list[Step]]:
    """The steps of jobs that run together."""
    steps: dict[int, list[Step]] = defaultdict(list)
    for number, each in enumerate(jobs):
        loop.start(number, each)
    while (found := loop.step()) is not None:
        for number, step in found.items():
            steps[number].append(step)
    loop.check()
    return [steps[number] for number in range(len(jobs))]


def samples(steps: list[Step]) -> dict[int, tuple[list[Token], str]]:
    tokens: dict[int, list[Token]] = defaultdict(list)
    reasons: dict[int, str] = {}
    for step in steps:
        for sample, token in step.sampled:
            tokens[sample].append(token)
        for sample, reason in step.ended:
            reasons[sample] = reason
    return {sample: (tokens[sample], reason) for sample, reason in reasons.items()}


def text(tokens: list[Token]) -> str:
    return b"".join(TEXTS[token.id] for token in tokens if token.id != END).decode()


def make_jobs(count: int) -> list[Job]:
    rng = random.Random(5)
    settings = [
        Sampling(),
        Sampling(0.0),
        Sampling(0.7, 0.9, presence_penalty=0.5),
        Sampling(top_k=3),
        Sampling(min_p=0.1),
    ]
    return [
        job(
            rng.choice(GRAMMARS),
            prompt=tuple(rng.randrange(1, VOCABULARY) for _ in range(rng.randrange(1, 20))),
            samples=rng.choice([1, 1, 4]),
            sampling=rng.choice(settings),
            key=rng.randbytes(16),
            alternatives=rng.choice([None, 2]),
            prompt_alternatives=rng.choice([None, None, 1]),
            min_tokens=rng.choice([0, 0, 3]),
            prediction=rng.choice([(), (2, 3, 4, 5, 6, 7)]),
            client=rng.choice("ab"),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("rules", [{}, {"grid": 4}, {"can_truncate": False}], ids=str)
def test_100_jobs_get_the_same_tokens_alone_and_in_a_crowd(rules: dict[str, int]) -> None:
    jobs = make_jobs(100)
    crowd = play(new_loop(3, **rules), jobs)
    constrained = 0
    for each, steps in zip(jobs, crowd, strict=True):
        (own,) = play(new_loop(3, **rules), [each])
        assert samples(steps) == samples(own)
        for sample, (tokens, reason) in samples(own).items():
            if each.grammar is None:
                assert [token.id for token in tokens] == alone(each, sample)
            elif reason == "stop":
                assert re.fullmatch(PATTERNS[each.grammar.text], text(tokens))
                constrained += 1
    assert constrained > 50


def test_a_text_that_can_only_end_ends_with_its_last_token() -> None:
    found = samples(play(new_loop(), [job(CHOICE, samples=8)])[0])
    assert {text(tokens) for tokens, _ in found.values()} == {"abx", "true"}
    assert {reason for _, reason in found.values()} == {"stop"}
    assert all(token.id != END for tokens, _ in found.values() for token in tokens)


def test_the_end_token_is_sampled_only_where_the_text_is_complete() -> None:
    forced = Sampling(logit_bias=((END, 100.0),))
    found = samples(play(new_loop(), [job(PARTS, samples=8, sampling=forced)])[0])
    assert all(re.fullmatch("(ab|a|12){2}", text(tokens)) and tokens[-1].id == END for tokens, _ in found.values())


def test_min_tokens_holds_while_the_grammar_allows_more_text() -> None:
    forced = Sampling(logit_bias=((END, 100.0),))
    found = samples(play(new_loop(), [job(PARTS, samples=8, sampling=forced, min_tokens=6)])[0])
    # "1" is not complete, and then "2" comes before the end token
    assert {len(tokens) for tokens, _ in found.values()} <= {7, 8}
    assert all(tokens[-1].id == END for tokens, _ in found.values())
    short = samples(play(new_loop(), [job(CHOICE, min_tokens=20)])[0])
    assert short[0][1] == "stop"


def test_without_end_tokens_a_text_goes_on_until_nothing_can_follow() -> None:
    found = samples(play(new_loop(), [job(PARTS, samples=8, end_tokens=())])[0])
    assert all(re.fullmatch("(ab|a|12){9}", text(tokens)) and reason == "stop" for tokens, reason in found.values())


def test_a_grammar_of_the_empty_text_generates_nothing() -> None:
    assert samples(play(new_loop(), [job(Grammar("regex", "", "grammar"), samples=2)])[0]) == {
        0: ([], "stop"),
        1: ([], "stop"),
    }


def test_log_probabilities_are_those_of_the_unmodified_model() -> None:
    """The first token has the log probability that it has without a grammar."""
    free = samples(play(new_loop(), [job(None, samples=64, alternatives=VOCABULARY)])[0])
    row = dict(free[0][0][0].top)
    found = samples(play(new_loop(), [job(PARTS, samples=8, alternatives=3)])[0])
    for tokens, _ in found.values():
        assert tokens[0].logprob == row[tokens[0].id]
        assert tokens[0].top == free[0][0][0].top[:3]


def test_a_wrong_grammar_fails_its_own_job_before_any_token() -> None:
    wrong = Grammar("regex", "(", "structured_outputs.regex")
    found = play(new_loop(), [job(wrong), job(None), job(wrong), job(LIST)])
    for steps in (found[0], found[2]):
        assert steps[-1].failed
        assert "unclosed group" in steps[-1].error
        assert not any(step.sampled for step in steps)
    assert samples(found[1])
    assert samples(found[3])


def test_a_text_that_no_token_can_continue_fails() -> None:
    found = play(new_loop(), [job(Grammar("regex", "a[é]", "grammar")), job(None)])
    assert found[0][-1].failed
    assert "no token" in found[0][-1].error
    assert samples(found[1])


def test_an_engine_without_grammars_says_so() -> None:
    steps = play(EngineLoop(HistoryRunner(2, 8)), [job(LIST)])[0]
    assert [step.failed for step in steps] == [True]
    assert "cannot constrain" in steps[0].error


def test_a_job_that_generates_nothing_needs_no_grammar() -> None:
    steps = play(EngineLoop(HistoryRunner(2, 8)), [job(LIST, max_tokens=0)])[0]
    assert samples(steps) == {0: ([], "length")}


class _Compiler:
    """Records when compiling begins."""

    def __init__(self) -> None:
        self.started: list[Grammar] = []

    def get(self, _: Grammar) -> Matcher | None:
        return None

    def start(self, grammar: Grammar) -> None:
        self.started.append(grammar)

    def result(self) -> Matcher | str | None:
        return "no"

    def wait(self, seconds: float) -> None:
        pass


def test_compiling_begins_after_the_step_that_announces_it_was_sent() -> None:
    compiler = _Compiler()
    keeper = GrammarKeeper(compiler)
    keeper.request(7, job(LIST))
    assert keeper.holds_back(7)
    assert keeper.collect(()) == [(7, Step(compiling=True))]
    assert keeper.collect((7,)) == []
    assert not compiler.started
    assert keeper.collect(()) == []
    assert compiler.started == [LIST]
    assert keeper.collect(()) == [(7, Step(failed=True, error="Invalid 'json_schema': no"))]
    assert not keeper.holds_back(7)


def test_a_grammar_of_two_fields_is_compiled_once_and_its_errors_name_the_field_of_each_job() -> None:
    compiler = _Compiler()
    keeper = GrammarKeeper(compiler)
    for number, field in enumerate(("json_schema", "response_format.schema")):
        keeper.request(number, job(msgspec.structs.replace(LIST, field=field)))
    steps = [pair for _ in range(3) for pair in keeper.collect(())]
    assert steps[0] == (0, Step(compiling=True))
    assert [(number, step and step.error) for number, step in steps[1:]] == [
        (0, "Invalid 'json_schema': no"),
        (1, "Invalid 'response_format.schema': no"),
    ]
    assert len(compiler.started) == 1
    assert not keeper.waits


def test_a_closed_job_is_forgotten_while_its_grammar_is_compiled() -> None:
    loop = new_loop()
    loop.start(1, job(LIST))
    loop.step()
    loop.close(1)
    while loop.step() is not None:
        pass
    loop.check()
    assert not loop.waits
    assert samples(play(loop, [job(LIST)])[0])


def test_a_slow_matcher_makes_only_its_own_job_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """From its second token on. Its tokens are the same."""
    monkeypatch.setattr(grammar_threads, "SLOW_SECONDS", 0.0)
    jobs = [job(LIST, samples=3), job(None), job(PARTS)]
    slow = play(new_loop(), jobs)
    monkeypatch.undo()
    assert [samples(steps) for steps in slow] == [samples(steps) for steps in play(new_loop(), jobs)]


def test_a_matcher_that_fails_ends_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = new_loop()
    assert samples(play(loop, [job(LIST)])[0])
    allowed = grammar_threads.GrammarMatcher.allowed
    asked: list[int] = []

    def fail_later(matcher: grammar_threads.GrammarMatcher) -> AllowedTokens:
        asked.append(1)
        found = allowed(matcher)
        return msgspec.structs.replace(found, error="it is too much") if len(asked) == 4 else found

    monkeypatch.setattr(grammar_threads.GrammarMatcher, "allowed", fail_later)
    endless = Grammar("regex", "[abx]{30}", "grammar")
    found = play(loop, [job(endless), job(None)])
    assert (found[0][-1].failed, found[0][-1].error) == (True, "Invalid 'grammar': it is too much")
    assert sum(len(step.sampled) for step in found[0]) == 3
    assert samples(found[1])[0][0]


class RecordingCompiler:
    """Notes the order in which grammars are compiled, and has no result before the next one is asked for."""

    def __init__(self) -> None:
        self.started: list[str] = []

    def get(self, grammar: Grammar) -> Matcher | None:
        return None

    def start(self, grammar: Grammar) -> None:
        self.started.append(grammar.text)

    def result(self) -> Matcher | str | Busy | None:
        return Busy()

    def wait(self, seconds: float) -> None:
        pass


def test_clients_take_turns_and_short_grammars_are_first() -> None:
    compiler = RecordingCompiler()
    keeper = GrammarKeeper(compiler)
    wanted = [("a", "aaaa1"), ("a", "aaaa2"), ("a", "a3"), ("b", "bbbbbb"), (f"c{BATCH_CLIENT}", "c")]
    for number, (client, words) in enumerate(wanted):
        keeper.request(number, job(Grammar("regex", words, "grammar"), client=client))
    ended: dict[int, Step] = {}
    while keeper.waits:
        ended |= {number: step for number, step in keeper.collect(()) if step and step.failed}
    assert compiler.started == ["a3", "bbbbbb", "aaaa1", "aaaa2", "c"]
    assert all(step.busy for step in ended.values())
    assert len(ended) == len(wanted)


def test_allowed_token_ids_hold_with_a_grammar() -> None:
    def allowing(*words: bytes) -> Sampling:
        bits = sum(1 << TEXTS.index(word) for word in words).to_bytes(8, "little")
        return Sampling(chain=SamplerChain(("temperature",), allowed=bits))

    grammar = Grammar("regex", "(ab|a|12)+", "grammar")
    (steps,) = play(new_loop(), [job(grammar, sampling=allowing(b"a"), max_tokens=5)])
    assert text(samples(steps)[0][0]) == "aaaaa"
    (steps,) = play(new_loop(), [job(CHOICE, sampling=allowing(b"ab"))])
    assert "allowed_token_ids" in steps[-1].error
    (steps,) = play(new_loop(), [job(Grammar("regex", "a(x)?", "grammar"), sampling=allowing(b"a"))])
    assert samples(steps)[0][1] == "stop"


def test_a_grammar_that_takes_too_much_work_fails_with_the_name_of_its_field(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_threads, "APPEND_SECONDS", -1.0)
    (steps,) = play(new_loop(), [job(LIST)])
    expected = "Invalid 'json_schema': it takes too much work for each token of the text."
    assert (steps[-1].failed, steps[-1].error) == (True, expected)


class OneToken(HistoryRunner):
    """Only token 0, which is no text, has a finite logit."""

    def run(self, batch: ForwardBatch) -> Logits:
        logits = super().run(batch)
        logits[:, 1:] = -np.inf
        return logits


@pytest.mark.parametrize("order", [None, ("temperature",), ("top_k", "temperature"), ("min_p",)])
def test_a_model_that_excludes_all_tokens_of_a_grammar_ends_the_sample(order: tuple[str, ...] | None) -> None:
    loop = EngineLoop(OneToken(4, 8))
    loop.use_grammars(GrammarThreads(TEXTS))
    sampling = Sampling(top_k=3, min_p=0.1, chain=None if order is None else SamplerChain(order))
    found = play(loop, [job(PARTS, sampling=sampling), job(None, sampling=sampling, max_tokens=3)])
    assert found[0][-1].failed
    assert found[0][-1].error.startswith("Invalid 'grammar': the text cannot go on")
    assert [token.id for token in samples(found[1])[0][0]] == [0, 0, 0]
