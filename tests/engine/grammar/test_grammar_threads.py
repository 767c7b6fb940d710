"""The threads of grammars: results, errors, what is kept, and tasks that take too long."""

from __future__ import annotations

import threading
import time

import pytest

from afterword.engine.core.matcher import Busy, Matcher
from afterword.engine.grammar import grammar_threads
from afterword.engine.grammar.grammar_threads import GrammarThreads
from afterword.engine.grammar.task_thread import Task, TaskThread
from afterword.engine.protocol import Grammar

TEXTS = tuple(bytes([byte]) for byte in range(128))


def compiled(threads: GrammarThreads, grammar: Grammar) -> Matcher | str | Busy:
    threads.start(grammar)
    while (found := threads.result()) is None:
        threads.wait(1)
    return found


def test_a_compiled_grammar_is_kept_whatever_field_it_came_from() -> None:
    threads = GrammarThreads(TEXTS)
    first = compiled(threads, Grammar("regex", "a", "grammar"))
    assert threads.get(Grammar("regex", "a", "structured_outputs.regex")) is first
    assert threads.get(Grammar("lark", "a", "grammar")) is None


def test_the_grammars_used_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_threads, "MAX_KEPT", 2)
    threads = GrammarThreads(TEXTS)
    first, second, third = (Grammar("regex", text, "grammar") for text in "abc")
    for grammar in (first, second):
        compiled(threads, grammar)
    assert threads.get(first)
    compiled(threads, third)
    assert [threads.get(each) is not None for each in (first, second, third)] == [True, False, True]


def test_the_text_of_kept_grammars_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_threads, "MAX_KEPT_TEXT", 5)
    threads = GrammarThreads(TEXTS)
    first, second = Grammar("regex", "aaa", "grammar"), Grammar("regex", "bbb", "grammar")
    compiled(threads, first)
    compiled(threads, second)
    assert [threads.get(each) is not None for each in (first, second)] == [False, True]


def test_a_grammar_that_takes_too_long_fails_and_the_next_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = GrammarThreads(TEXTS)
    release = threading.Event()
    compile_grammar = grammar_threads.compile_grammar

    def slowly(grammar: Grammar, tokens: object) -> object:
        if grammar.text == "slow":
            release.wait(60)
        return compile_grammar(grammar, tokens)  # type: ignore[arg-type]

    monkeypatch.setattr(grammar_threads, "compile_grammar", slowly)
    monkeypatch.setattr(grammar_threads, "COMPILE_SECONDS", 0.05)
    found = compiled(threads, Grammar("regex", "slow", "grammar"))
    assert isinstance(found, str)
    assert "takes longer than 0.05 s" in found
    assert not isinstance(compiled(threads, Grammar("regex", "b", "grammar")), str)
    monkeypatch.setattr(grammar_threads, "MAX_STUCK", 1)
    assert isinstance(compiled(threads, Grammar("regex", "c", "grammar")), Busy)
    release.set()


def test_a_mask_that_takes_too_long_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_threads, "MASK_SECONDS", 0.05)
    threads = GrammarThreads(TEXTS)
    kept = compiled(threads, Grammar("regex", "abc", "grammar"))
    assert not isinstance(kept, str)
    hanging, other = kept.copy(), kept.copy()
    release = threading.Event()
    monkeypatch.setattr(hanging._place, "allowed", lambda: release.wait(60))  # type: ignore[attr-defined]
    hanging.append(ord("a"))
    other.append(ord("a"))
    assert "takes too long" in hanging.allowed().error
    found = other.allowed()
    assert not found.error
    assert found.mask[ord("b") // 32] == 1 << ord("b") % 32
    release.set()


def test_a_task_that_was_given_up_changes_nothing_later() -> None:
    thread, release = TaskThread("test"), threading.Event()
    stuck: Task[bool] = thread.submit(lambda: release.wait(60))
    after: Task[int] = thread.submit(lambda: 7)
    while not stuck.done.is_set():
        thread.give_up(0)
        time.sleep(0.001)
    assert isinstance(stuck.failure, TimeoutError)
    assert after.done.wait(60)
    assert after.result == 7
    assert thread.stuck == 1
    release.set()
    while thread.stuck:
        time.sleep(0.001)


def test_a_closed_thread_ends_after_its_running_task() -> None:
    """Else Python would end it within the task, and llguidance cannot be ended there."""
    thread, begun, release = TaskThread("to be closed"), threading.Event(), threading.Event()
    running: Task[bool] = thread.submit(lambda: begun.set() or release.wait(60))
    behind: Task[int] = thread.submit(lambda: 7)
    assert begun.wait(60)
    closing = threading.Thread(target=thread.close)
    closing.start()
    assert named("to be closed") == 1
    release.set()
    closing.join(60)
    assert (named("to be closed"), running.result, behind.done.is_set()) == (0, True, False)


def test_closed_threads_of_grammars_have_ended() -> None:
    names = ("grammars", "token masks")
    before = [named(name) for name in names]
    threads = GrammarThreads(TEXTS)
    matcher = compiled(threads, Grammar("regex", "ab*", "grammar"))
    assert isinstance(matcher, grammar_threads.GrammarMatcher)
    matcher.copy().append(ord("a"))
    assert [named(name) for name in names] == [count + 1 for count in before]
    threads.close()
    assert [named(name) for name in names] == before


def named(name: str) -> int:
    """How many running threads have this name."""
    return sum(thread.name == name for thread in threading.enumerate())


def test_a_grammar_whose_tokens_take_too_much_work_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = GrammarThreads(TEXTS)
    matcher = compiled(threads, Grammar("regex", "ab*", "grammar"))
    assert isinstance(matcher, grammar_threads.GrammarMatcher)
    sample = matcher.copy()
    monkeypatch.setattr(grammar_threads, "APPEND_SECONDS", -1.0)
    sample.append(ord("a"))
    assert "too much work" in sample.allowed().error
    assert "too much work" in matcher.copy().allowed().error


def test_a_long_chain_of_rules_does_not_end_the_process() -> None:
    chain = "start: a0\n" + "".join(f"a{number}: a{number + 1}\n" for number in range(6000)) + 'a6000: "x"\n'
    found = compiled(GrammarThreads(TEXTS), Grammar("lark", chain, "grammar"))
    assert isinstance(found, grammar_threads.GrammarMatcher)
