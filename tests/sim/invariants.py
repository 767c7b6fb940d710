"""What happened in a world, and what must never happen: the invariants. It is told everything and decides nothing."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import history_runner
from history_runner import scores

from afterword.engine.core.fair_share import TURN_PASSES
from afterword.engine.core.forward_batch import ForwardBatch
from afterword.engine.core.scheduler import REST_PASSES, Scheduler
from afterword.engine.parent.supervisor import QueuePolicy
from afterword.engine.protocol import BATCH_CLIENT, Engine, Job, JobHandle, ModelInfo, Step
from afterword.errors import AfterwordError
from afterword.keys.key import Allowance

from .process import FakeProcess

WINDOW = 100  # passes over which shares are compared
SOON = 60
"""Passes over running sequences after which a client that waits has its share. Longer than a sample is protected after
a pause, and than prompts take; shorter than the samples of greedy clients."""


class BrokenError(AssertionError):
    """An invariant does not hold. `rule` is its number."""

    def __init__(self, rule: int, what: str) -> None:
        super().__init__(f"invariant {rule}: {what}")
        self.rule = rule


def require(rule: int, holds: bool, what: str) -> None:
    """Raise `BrokenError` unless it holds."""
    if not holds:
        raise BrokenError(rule, what)


@dataclass(eq=False)
class Entry:
    """A job that was accepted, and what it brought."""

    name: int
    job: Job
    since: float
    begun: bool = False
    over: bool = False
    left: bool = False
    dropped: set[int] = field(default_factory=set)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    scored: int = 0
    ended: set[int] = field(default_factory=set)

    @property
    def size(self) -> int:
        return len(self.job.prompt) + self.job.samples * self.job.max_tokens


@lru_cache(4096)
def wanted(job: Job, sample: int) -> list[int]:
    """The tokens that a sample has alone."""
    return history_runner.alone(job, sample)


class Ledger:
    """Owner of the trace, of what is known of every job, and of what every key was granted."""

    def __init__(self, policy: QueuePolicy, sequences: int, fair: bool) -> None:
        self._short: Counter[str] = Counter()  # passes in which a client held less than its share and wanted more
        self._without: Counter[str] = Counter()  # passes in which it held nothing and wanted something
        self.jobs: list[Entry] = []
        self.outcomes: Counter[str] = Counter()
        self.deaths = 0
        self.overslept = 0.0  # until when timers may be late
        self._policy = policy
        self._sequences = sequences
        self._fair = fair
        self._trace = hashlib.blake2b(digest_size=8)
        self._process: FakeProcess | None = None
        self._passes = 0
        self._shares: deque[tuple[frozenset[str], Counter[str]]] = deque(maxlen=WINDOW)

    @property
    def trace(self) -> str:
        """Names everything that happened, in order."""
        return self._trace.hexdigest()

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def note(self, *facts: object) -> None:
        """Something happened."""
        self._trace.update(repr((round(self.now, 6), *facts)).encode())
        self.deaths += facts[0] == "died"

    # ---- jobs

    def accepted(self, job: Job) -> Entry:
        """The engine took a job."""
        entry = Entry(len(self.jobs), job, self.now)
        self.jobs.append(entry)
        self.note("job", entry.name, job.client, len(job.prompt), job.samples, job.max_tokens)
        return entry

    def brought(self, entry: Entry, step: Step) -> None:
        """A step reached who waits for it."""
        require(4, not entry.left, "a step for a job whose client has left")
        entry.begun = True
        entry.scored += len(step.scored)
        for sample, token in step.sampled:
            require(4, sample not in entry.ended, "a token for a sample that has ended")
            entry.tokens.setdefault(sample, []).append(token.id)
        entry.ended |= {sample for sample, _ in step.ended}
        self.note("step", entry.name, [(sample, token.id) for sample, token in step.sampled], step.ended, step.cached)

    def over(self, entry: Entry, whole: bool) -> None:
        """Nothing more will come; are the tokens those that it has alone?"""
        if entry.over:
            return
        entry.over = True
        self.note("over", entry.name, whole)
        for sample in range(entry.job.samples) if whole or entry.tokens else ():
            expected, got = wanted(entry.job, sample), entry.tokens.get(sample, [])
            require(5, got == expected[: len(got)], f"sample {sample} got {got} instead of {expected}")
            if whole and sample not in entry.dropped:
                require(5, len(got) == len(expected), f"sample {sample} ended early: {got} of {expected}")
        if whole and not entry.dropped:
            require(5, entry.scored == len(scores(entry.job)), "not every token of the prompt was scored")

    def check_queue(self) -> None:
        """Is it within its limits? For when what happened at this moment has settled."""
        live = [each for each in self.jobs if not each.over]
        waiting = [each for each in live if not each.begun]
        require(3, len(live) <= self._policy.queue + self._sequences, f"{len(live)} jobs were accepted")
        tokens = sum(each.size for each in waiting)
        require(3, len(waiting) <= 1 or tokens <= self._policy.queue_tokens, f"{tokens} tokens wait")

    def check_waiting(self) -> None:
        """Has anything waited for too long?"""
        latest = self.now - self._policy.queue_seconds - 1.0
        if self._policy.queue_seconds and self.now > self.overslept:
            for entry in self.jobs:
                require(6, entry.begun or entry.over or entry.since >= latest, f"job {entry.name} waits too long")

    # ---- shares

    def passed(self, process: FakeProcess, batch: ForwardBatch) -> None:
        """A pass was computed for these: did every client that waits get its share, now and of the last ones?"""
        assert process.core is not None
        if process is not self._process:
            self._process = process
            for each in (self._shares, self._short, self._without):
                each.clear()
        scheduler = process.core._scheduler
        held = Counter(sequence.work.job.client for sequence in scheduler._active.values())
        for client in list(self._without):
            if _group_of(client, held):
                del self._without[client]
        if not scheduler.sequence_in(batch.entries[0].slot).needs_prefill:
            self._check_shares(scheduler, held)
        if not self._fair:
            return
        shares: Counter[str] = Counter()
        for row in batch.entries:
            # not tokens: of who has a prefix few are computed
            shares[scheduler.sequence_in(row.slot).work.job.client] += 1
        self._shares.append((frozenset(scheduler._waiting), shares))
        self._passes += 1
        if len(self._shares) < WINDOW or self._passes % 8:
            return
        total = sum((shares for _, shares in self._shares), Counter())
        there = frozenset(total).union(*(waiting for waiting, _ in self._shares))
        for client in frozenset.intersection(*(waiting for waiting, _ in self._shares)):
            share = total[client] / total.total()
            require(7, share >= 0.5 / len(there), f"one of {len(there)} clients got {share:.0%}")

    def _check_shares(self, scheduler: Scheduler, held: Counter[str]) -> None:
        """Has any client that wants more held less than its share for too long, or nothing at all?"""
        resting = {work.job.client for work in scheduler._works.values() if work.queued}
        wanting = {*scheduler._waiting, *resting}
        for counts in (self._short, self._without):
            for client in set(counts) - wanting:
                del counts[client]
        for client in sorted(wanting):
            self._short[client] = self._short[client] + 1 if _holds_less(client, held, self._sequences) else 0
            self._without[client] += not _group_of(client, held)
            most = SOON + (REST_PASSES[1] if client in resting else 0)
            require(11, self._short[client] <= most, f"{client} holds {held[client]} while others hold {dict(held)}")
            turns = (len(wanting | set(held))) * (TURN_PASSES + SOON)
            require(11, self._without[client] <= turns, f"{client} holds nothing for {turns} passes")


def _group_of(client: str, held: Counter[str]) -> int:
    """Sequences that are counted together with a client's: those of all batches, or its own."""
    return sum(
        n
        for name, n in held.items()
        if name == client or (name.endswith(BATCH_CLIENT) and client.endswith(BATCH_CLIENT))
    )


def _holds_less(client: str, held: Counter[str], sequences: int) -> bool:
    """Whether a client holds less than its share: another one holds two more, or batches hold more than half."""
    batch = client.endswith(BATCH_CLIENT)
    for other, count in held.items():
        if batch and other.endswith(BATCH_CLIENT):
            if count >= held[client] + 2:
                return True
        elif _group_of(other, held) >= _group_of(client, held) + 2:
            return True
    return not batch and _group_of(BATCH_CLIENT, held) > max(1, sequences // 2)


class Meter:
    """What one key was granted, against a bucket of its own making: at any time at most a minute's worth more than
    what has come in since any earlier time."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._level = Fraction(0)
        self._lowest = Fraction(0)
        self._out = 0

    def take(self, amount: int, now: float) -> None:
        """So much was granted."""
        self._out += amount
        if self._limit is None:
            return
        spent = self._level + amount - Fraction(now) * self._limit / 60
        self._lowest = min(self._lowest, self._level - Fraction(now) * self._limit / 60)
        self._level += amount
        require(9, spent - self._lowest <= self._limit + Fraction(1, 1000), "more was granted than a minute brings")

    def give(self, amount: int) -> None:
        """So much was given back."""
        require(9, 0 <= amount <= self._out, "more was given back than was taken")
        self._out -= amount
        self._level -= amount


@dataclass
class Account:
    """A key's limits as they should be kept."""

    requests: Meter
    tokens: Meter
    most: int | None
    inside: int = 0

    @classmethod
    def of(cls, allowance: Allowance) -> Account:
        return cls(Meter(allowance.requests), Meter(allowance.tokens), allowance.concurrent)

    def entered(self, now: float) -> None:
        """A request was let in."""
        self.inside += 1
        self.requests.take(1, now)
        require(9, self.most is None or self.inside <= self.most, "too many requests at once")


class ObservedEngine:
    """The engine as the ledger sees it used."""

    def __init__(self, engine: Engine, ledger: Ledger) -> None:
        self._engine = engine
        self._ledger = ledger

    @property
    def model_info(self) -> ModelInfo:
        return self._engine.model_info

    async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
        return await self._engine.tokenize(text, special, client)

    def start(self, job: Job) -> JobHandle:
        run = self._engine.start(job)
        return ObservedRun(run, self._ledger.accepted(job), self._ledger)


class ObservedRun:
    """A run as the ledger sees it."""

    def __init__(self, run: JobHandle, entry: Entry, ledger: Ledger) -> None:
        self._run = run
        self._entry = entry
        self._ledger = ledger

    async def __aiter__(self) -> AsyncIterator[Step]:
        try:
            async for step in self._run:
                self._ledger.brought(self._entry, step)
                yield step
        except AfterwordError as error:
            self._ledger.note("failed", self._entry.name, type(error).__name__)
            self._ledger.over(self._entry, whole=False)
            raise
        self._ledger.over(self._entry, whole=True)

    def drop(self, sample: int) -> None:
        self._entry.dropped.add(sample)
        self._run.drop(sample)

    def close(self) -> None:
        self._entry.left = True
        self._run.close()
        self._ledger.over(self._entry, whole=False)

    def pause(self) -> None:
        self._ledger.note("pauses", self._entry.name)
        self._run.pause()

    def resume(self) -> None:
        self._run.resume()
