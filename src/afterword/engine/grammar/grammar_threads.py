"""The threads that compile grammars and compute token masks beside forward passes.

Three threads: one compiles, one computes masks, and one computes the masks of samples for which a pass once had to
wait. A task that takes too long fails, and its thread is replaced.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from afterword.engine.core.matcher import AllowedTokens, Busy, grammar_key
from afterword.engine.grammar.compiled_grammar import GrammarTokens, InvalidGrammar, Place, compile_grammar
from afterword.engine.grammar.task_thread import Task, TaskThread
from afterword.engine.protocol import Grammar

COMPILE_SECONDS = 5.0
"""How long a grammar may take to be compiled."""
MASK_SECONDS = 2.0
"""How long a mask may take."""
APPEND_SECONDS = 0.05
"""CPU time that a token may take to be noted in a grammar: the engine's thread does that, for each sample in turn."""
SLOW_SECONDS = 0.01
"""A sample for whose mask a pass has waited longer than this is computed only when its mask is ready."""
MAX_STUCK = 2
"""While so many threads are stuck in grammars, no other grammar is compiled."""
MAX_KEPT = 64
"""Compiled grammars that are kept."""
MAX_KEPT_TEXT = 2**21
"""Characters of the kept grammars together."""

_FAILED = AllowedTokens(np.zeros(0, np.uint32), False)
_TOO_MUCH = AllowedTokens(_FAILED.mask, False, "it takes too much work for each token of the text.")


class GrammarThreads:
    """Implements `core.matcher.GrammarCompiler`. The engine's thread calls all methods.

    `token_texts`: the bytes of each token, b"" for those that are no text. Create the object before requests come:
    for a large vocabulary that takes more than half a second, in which no other thread of the interpreter runs.
    """

    def __init__(self, token_texts: Sequence[bytes]) -> None:
        self._tokens = GrammarTokens(token_texts)
        self._something_done = threading.Event()
        self._compiling = TaskThread("grammars", self._something_done.set)
        self.masks = TaskThread("token masks", self._something_done.set)
        self.slow_masks = TaskThread("slow token masks", self._something_done.set)
        self._kept: OrderedDict[tuple[str, str], GrammarMatcher] = OrderedDict()
        self._refused: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._task: Task[Compiled] | None = None
        self._grammar: Grammar | None = None

    def get(self, grammar: Grammar) -> GrammarMatcher | None:
        """See `GrammarCompiler`."""
        if grammar_key(grammar) in self._kept:
            self._kept.move_to_end(grammar_key(grammar))
        return self._kept.get(grammar_key(grammar))

    def start(self, grammar: Grammar) -> None:
        """See `GrammarCompiler`."""
        self._grammar = grammar
        self._task = self._compiling.submit(lambda: self._compile(grammar)) if self._stuck < MAX_STUCK else None

    def result(self) -> GrammarMatcher | str | Busy | None:
        """See `GrammarCompiler`."""
        assert self._grammar is not None
        if self._task is None:
            return Busy()
        self._compiling.give_up(COMPILE_SECONDS)
        if not self._task.done.is_set():
            return None
        problem, found = self._task.failure, self._task.result
        if problem is None and found is not None:
            matcher = GrammarMatcher(self, self._grammar, *found)
            self._keep(self._grammar, matcher)
            return matcher
        if isinstance(problem, InvalidGrammar):
            return str(problem)
        if isinstance(problem, TimeoutError):
            return f"it takes longer than {COMPILE_SECONDS:g} s to compile."
        return f"it cannot be compiled ({type(problem).__name__})."

    def refuse(self, grammar: Grammar) -> None:
        """Let all samples with this grammar fail from now on: tokens of it hold up the engine's thread."""
        self._refused[grammar_key(grammar)] = None
        if len(self._refused) > MAX_KEPT:
            self._refused.popitem(last=False)

    def is_refused(self, grammar: Grammar) -> bool:
        return bool(self._refused) and grammar_key(grammar) in self._refused

    def wait(self, seconds: float) -> None:
        """See `GrammarCompiler`."""
        self._something_done.wait(seconds)
        self._something_done.clear()

    def close(self) -> None:
        """Wait for what is being computed and end the threads, before Python ends. Nothing is called afterwards."""
        for thread in (self._compiling, self.masks, self.slow_masks):
            thread.close()

    @property
    def _stuck(self) -> int:
        return self._compiling.stuck + self.masks.stuck + self.slow_masks.stuck

    def _compile(self, grammar: Grammar) -> Compiled:
        place = compile_grammar(grammar, self._tokens)
        allowed = place.copy().allowed()
        if allowed.error:
            raise InvalidGrammar(allowed.error)
        if not allowed.complete and not allowed.mask.any():
            raise InvalidGrammar("it allows no text that the model's tokens can spell.")
        if self.is_refused(grammar):
            raise InvalidGrammar(_TOO_MUCH.error)
        return place, allowed

    def _keep(self, grammar: Grammar, matcher: GrammarMatcher) -> None:
        self._kept[grammar_key(grammar)] = matcher
        while len(self._kept) > MAX_KEPT or sum(len(text) for _, text in self._kept) > MAX_KEPT_TEXT:
            if len(self._kept) == 1:
                break
            self._kept.popitem(last=False)


Compiled = tuple[Place, AllowedTokens]
"""The beginning of a grammar, and what may stand there."""


class GrammarMatcher:
    """Implements `core.matcher.Matcher`. `allowed`: what may follow, if it is known already."""

    def __init__(
        self, threads: GrammarThreads, grammar: Grammar, place: Place, allowed: AllowedTokens | None = None
    ) -> None:
        self._threads = threads
        self._grammar = grammar
        self._place = place
        self._allowed = allowed
        self._task: Task[AllowedTokens] | None = None
        self._thread = threads.masks  # that does the task
        self.is_slow = False

    def copy(self) -> GrammarMatcher:
        """See `Matcher`."""
        return GrammarMatcher(self._threads, self._grammar, self._place.copy(), self._allowed)

    def append(self, token: int) -> bool:
        """See `Matcher`."""
        self._allowed = None
        start = time.thread_time()
        ends = self._place.append(token)
        if time.thread_time() - start > APPEND_SECONDS:
            self._threads.refuse(self._grammar)
        if ends:
            return True
        self._compute_mask()
        return False

    def take_back(self, count: int) -> None:
        """See `Matcher`."""
        self._allowed = None
        self._place.take_back(count)
        self._compute_mask()

    def _compute_mask(self) -> None:
        self._thread = self._threads.slow_masks if self.is_slow else self._threads.masks
        self._task = self._thread.submit(self._place.allowed)

    @property
    def is_ready(self) -> bool:
        """See `Matcher`."""
        self._thread.give_up(MASK_SECONDS)
        return self._task is None or self._task.done.is_set()

    def allowed(self) -> AllowedTokens:
        """See `Matcher`."""
        if self._allowed is None:
            assert self._task is not None, "a token was appended"
            self.is_slow = self.is_slow or not self._task.done.wait(SLOW_SECONDS)
            while not self.is_ready:
                self._task.done.wait(SLOW_SECONDS)
            self._allowed = self._task.result or _failed(self._task.failure)
        return _TOO_MUCH if self._threads.is_refused(self._grammar) else self._allowed


def _failed(problem: Exception | None) -> AllowedTokens:
    reason = "takes too long" if isinstance(problem, TimeoutError) else f"failed ({type(problem).__name__})"
    return AllowedTokens(_FAILED.mask, False, f"it {reason} at this place of the text.")
