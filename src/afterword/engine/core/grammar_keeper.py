"""The grammars of the engine loop's jobs: a job waits until its grammar is compiled, or fails with what is wrong in it.

Grammars are compiled one at a time, in a thread of the compiler. A step says so before (`Step.compiling`), so that the
supervisor knows which job may have caused a crash. A matcher whose masks take long makes its job wait between two
passes instead of making a pass wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, field

from afterword.engine.core.matcher import (
    AllowedTokens,
    Busy,
    GrammarCompiler,
    Matcher,
    constrained,
    grammar_key,
    restricted,
)
from afterword.engine.core.sampler import SampleTokens
from afterword.engine.core.sequence import Sequence
from afterword.engine.protocol import BATCH_CLIENT, Grammar, Job, Step

_NO_GRAMMARS = "This model's engine cannot constrain its output."


@dataclass(slots=True)
class GrammarKeeper:
    """Owned by the engine loop, in the engine's thread. Without a compiler, jobs with a grammar fail.

    `errors`: the jobs whose grammar has failed in the current pass, with the reason.
    """

    compiler: GrammarCompiler | None = None
    errors: dict[int, str] = field(default_factory=dict)
    _waiting: dict[int, Grammar] = field(default_factory=dict)  # by job id, in the order of arrival
    _clients: dict[int, str] = field(default_factory=dict)  # of the waiting jobs
    _turns: Counter[str] = field(default_factory=Counter)  # compiled grammars by client, since any job waits
    _ready: dict[int, Matcher] = field(default_factory=dict)  # of jobs without a token, by job id
    _slow: dict[int, list[Matcher]] = field(default_factory=dict)  # whose masks are awaited, by job id
    _current: tuple[int, Grammar] | None = None  # the job whose grammar is compiled, or will be when that is announced
    _begun: bool = False

    def request(self, job_id: int, job: Job) -> None:
        """Compile the grammar of a job, if it has one and is not kept."""
        if job.grammar is None or not job.max_tokens:
            return
        if self.compiler and (matcher := self.compiler.get(job.grammar)):
            self._ready[job_id] = matcher
        else:
            self._waiting[job_id], self._clients[job_id] = job.grammar, job.client

    def holds_back(self, job_id: int) -> bool:
        """Whether nothing may be computed for a job now."""
        return job_id in self._waiting or job_id in self._slow

    @property
    def waits(self) -> bool:
        """Whether any job waits."""
        return bool(self._waiting or self._slow)

    def forget(self, job_id: int) -> None:
        """Note that a job has ended."""
        for jobs in (self._ready, self._slow, self.errors):
            jobs.pop(job_id, None)
        self._remove(job_id)

    def collect(self, unsent: Container[int]) -> list[tuple[int, Step | None]]:
        """What has changed since the last call: pairs of a job id and its step, which ends the job if it is `failed`.

        None: the job needs not wait any longer. `unsent`: the jobs with steps that are not sent yet.
        """
        if not self.waits:
            return []
        return [*self._collect_masks(), *self._collect_grammar(unsent), *self._begin_next(unsent)]

    def wait(self, seconds: float) -> bool:
        """Wait until something is ready, at most so long. Returns False at once if no job waits."""
        if self.waits and self.compiler:
            self.compiler.wait(seconds)
        return self.waits

    # ---- the samples of jobs with a compiled grammar

    def query(self, sequence: Sequence, samples: range | list[int]) -> SampleTokens | None:
        """The query for the next token of a sequence, for one of the tokens that a grammar of its job allows.

        None if the text ends here, or if the grammar has failed; then `errors` has the reason.
        """
        state = sequence.job_state
        if state.job.grammar is None or not state.job.max_tokens:
            return sequence.next_token(samples)
        by_grammar = self._matcher(sequence).allowed()
        allowed = restricted(by_grammar, state.job)
        if error := _problem(by_grammar, allowed, state.job.grammar.field):
            self.errors[state.job_id] = error
            return None
        return constrained(sequence.next_token(samples), allowed)

    def start_samples(self, job_id: int, samples: Iterable[Sequence]) -> None:
        """Give each sample of a job a matcher of its own, if the job has a grammar."""
        if matcher := self._ready.pop(job_id, None):
            for each in samples:
                each.matcher = matcher.copy()

    def append(self, sequence: Sequence, token: int) -> bool:
        """Note a sampled token. Returns whether nothing can follow it."""
        matcher, job_id = sequence.matcher, sequence.job_state.job_id
        if matcher is None:
            return False
        ends = matcher.append(token)
        if matcher.is_slow and not ends:
            self._slow.setdefault(job_id, []).append(matcher)
        return ends

    def take_back(self, sequence: Sequence, count: int) -> None:
        """Note that the last `count` tokens that were noted are not part of the text any longer."""
        matcher = sequence.matcher
        if matcher is None or not count:
            return
        matcher.take_back(count)
        if matcher.is_slow:
            self._slow.setdefault(sequence.job_state.job_id, []).append(matcher)

    def _matcher(self, sequence: Sequence) -> Matcher:
        return sequence.matcher or self._ready[sequence.job_state.job_id]

    # ---- what is awaited

    def _collect_masks(self) -> Iterator[tuple[int, Step | None]]:
        for job_id, matchers in list(self._slow.items()):
            if all(each.is_ready for each in matchers):
                del self._slow[job_id]
                yield job_id, None

    def _collect_grammar(self, unsent: Container[int]) -> Iterator[tuple[int, Step | None]]:
        if self._current is None:
            return
        job_id, grammar = self._current
        if not self._begun:
            if self.compiler and job_id not in unsent:
                self.compiler.start(grammar)
                self._begun = True
            return
        found = self.compiler.result() if self.compiler else None
        if found is None:
            return
        self._current, self._begun = None, False
        for each, wanted in [pair for pair in self._waiting.items() if grammar_key(pair[1]) == grammar_key(grammar)]:
            self._remove(each)
            if isinstance(found, str):
                yield each, Step(failed=True, error=f"Invalid '{wanted.field}': {found}")
            elif isinstance(found, Busy):
                yield each, Step(failed=True, busy=True)
            else:
                self._ready[each] = found
                yield each, Step(compiling=False) if each == job_id else None

    def _begin_next(self, unsent: Container[int]) -> Iterator[tuple[int, Step | None]]:
        if self._current is not None:
            return
        for job_id in sorted(self._waiting, key=self._order):
            grammar = self._waiting[job_id]
            if self.compiler is None:
                self._remove(job_id)
                yield job_id, Step(failed=True, error=_NO_GRAMMARS)
            elif matcher := self.compiler.get(grammar):
                self._remove(job_id)
                self._ready[job_id] = matcher
                yield job_id, None
            elif job_id not in unsent:
                self._turns[self._clients[job_id]] += 1
                self._current = job_id, grammar
                yield job_id, Step(compiling=True)
                return

    def _remove(self, job_id: int) -> None:
        """The job needs not wait for its grammar any longer."""
        self._waiting.pop(job_id, None)
        self._clients.pop(job_id, None)
        if not self._waiting:
            self._turns.clear()

    def _order(self, job_id: int) -> tuple[bool, int, int]:
        """Clients take turns, those of batches last; of one client the shorter grammar is next."""
        client = self._clients[job_id]
        return client.endswith(BATCH_CLIENT), self._turns[client], len(self._waiting[job_id].text)


def _problem(by_grammar: AllowedTokens, allowed: AllowedTokens, field: str) -> str:
    """Why no token can follow, though the text cannot end either; "" if one can. `allowed`: by other fields too."""
    if by_grammar.error:
        return f"Invalid '{field}': {by_grammar.error}"
    if allowed.error or allowed.complete or allowed.mask.any():
        return allowed.error
    return f"Invalid '{field}': this model has no token that can continue the text as the grammar demands."
