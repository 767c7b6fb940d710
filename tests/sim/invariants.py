"""The invariants of a simulation: records all events and raises `BrokenError` when an invariant does not hold.

The simulation, the clients and the simulated workers report events. The checker does not change their behaviour. The
numbers of the invariants are those of README.md.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache

import history_runner
from history_runner import scores

from afterword.engine.core.fair_share import TURN_PASSES
from afterword.engine.core.forward_batch import ForwardBatch
from afterword.engine.core.preemption import RESUME_PASSES
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.parent.job_queue import QueuePolicy
from afterword.engine.protocol import BATCH_CLIENT, Engine, Job, JobHandle, ModelInfo, Step
from afterword.errors import AfterwordError
from afterword.keys.key import Allowance

from .process import FakeProcess

WINDOW = 100  # passes over which the shares of invariant 7 are averaged
SHARE_PASSES = 60
"""Decode passes after which a waiting client must have its share.

It is more than the passes for which a preempted sample is protected and than prompts take. It is less than the length
of the samples of heavy clients."""


class BrokenError(AssertionError):
    """An invariant does not hold. `rule`: its number."""

    def __init__(self, rule: int, message: str) -> None:
        super().__init__(f"invariant {rule}: {message}")
        self.rule = rule


def require(rule: int, holds: bool, message: str) -> None:
    """Raise `BrokenError` unless the condition holds."""
    if not holds:
        raise BrokenError(rule, message)


@dataclass(eq=False)
class JobRecord:
    """An accepted job and the results that its client has received.

    `since`: time of acceptance. `begun`: its first step has arrived. `over`: it has ended. `left`: its client closed
    it. `dropped`: samples that the client ended.
    """

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
def expected_tokens(job: Job, sample: int) -> list[int]:
    """The tokens that a sample gets if no other job runs."""
    return history_runner.alone(job, sample)


class InvariantChecker:
    """Owner of the trace of all events and of the records of all jobs.

    `fair`: all clients always wait and send the same kind of request, so invariant 7 is checked too.
    """

    def __init__(self, policy: QueuePolicy, sequences: int, fair: bool) -> None:
        self._below_share: Counter[str] = Counter()  # by client: successive passes with less than its share
        self._without_slots: Counter[str] = Counter()  # by client: passes in which it waited and held nothing
        self.jobs: list[JobRecord] = []
        self.outcomes: Counter[str] = Counter()
        self.deaths = 0
        self.timers_late_until = 0.0  # the time until which timers may be late, after a jump of the clock
        self._policy = policy
        self._sequences = sequences
        self._fair = fair
        self._trace = hashlib.blake2b(digest_size=8)
        self._process: FakeProcess | None = None
        self._passes = 0
        self._shares: deque[tuple[frozenset[str], Counter[str]]] = deque(maxlen=WINDOW)

    @property
    def trace(self) -> str:
        """A hash of all events in order."""
        return self._trace.hexdigest()

    @property
    def now(self) -> float:
        return asyncio.get_running_loop().time()

    def record(self, *facts: object) -> None:
        """Add an event to the trace."""
        self._trace.update(repr((round(self.now, 6), *facts)).encode())
        self.deaths += facts[0] == "died"

    # ---- jobs

    def add_job(self, job: Job) -> JobRecord:
        """Record a job that the engine has accepted."""
        record = JobRecord(len(self.jobs), job, self.now)
        self.jobs.append(record)
        self.record("job", record.name, job.client, len(job.prompt), job.samples, job.max_tokens)
        return record

    def add_step(self, record: JobRecord, step: Step) -> None:
        """Record a step that a client has received."""
        require(4, not record.left, "a step for a job whose client has left")
        record.begun = True
        record.scored += len(step.scored)
        for sample, token in step.sampled:
            require(4, sample not in record.ended, "a token for a sample that has ended")
            record.tokens.setdefault(sample, []).append(token.id)
        record.ended |= {sample for sample, _ in step.ended}
        self.record(
            "step", record.name, [(sample, token.id) for sample, token in step.sampled], step.ended, step.cached
        )

    def end_job(self, record: JobRecord, whole: bool) -> None:
        """Record the end of a job and check its tokens. `whole`: it was not cancelled and did not fail."""
        if record.over:
            return
        record.over = True
        self.record("over", record.name, whole)
        for sample in range(record.job.samples) if whole or record.tokens else ():
            expected, got = expected_tokens(record.job, sample), record.tokens.get(sample, [])
            require(5, got == expected[: len(got)], f"sample {sample} got {got} instead of {expected}")
            if whole and sample not in record.dropped:
                require(5, len(got) == len(expected), f"sample {sample} ended early: {got} of {expected}")
        if whole and not record.dropped:
            require(5, record.scored == len(scores(record.job)), "not every token of the prompt was scored")

    def check_queue(self) -> None:
        """Check the limits of the queue. Call it when all tasks have processed the last event."""
        live = [each for each in self.jobs if not each.over]
        waiting = [each for each in live if not each.begun]
        require(3, len(live) <= self._policy.queue + self._sequences, f"{len(live)} jobs were accepted")
        tokens = sum(each.size for each in waiting)
        require(3, len(waiting) <= 1 or tokens <= self._policy.queue_tokens, f"{tokens} tokens wait")

    def check_waiting(self) -> None:
        """Check that no job has waited in the queue for longer than allowed."""
        latest = self.now - self._policy.queue_seconds - 1.0
        if self._policy.queue_seconds and self.now > self.timers_late_until:
            for record in self.jobs:
                require(6, record.begun or record.over or record.since >= latest, f"job {record.name} waits too long")

    # ---- shares

    def add_pass(self, process: FakeProcess, batch: ForwardBatch) -> None:
        """Record a forward pass. Check that each waiting client has its share of the slots and of the last passes."""
        assert process.engine_loop is not None
        if process is not self._process:
            self._process = process
            for each in (self._shares, self._below_share, self._without_slots):
                each.clear()
        scheduler = process.engine_loop._scheduler
        held = Counter(sequence.job_state.job.client for sequence in scheduler._active.values())
        for client in list(self._without_slots):
            if _group_slots(client, held):
                del self._without_slots[client]
        if not scheduler.sequence_in(batch.entries[0].slot).needs_prefill:
            self._check_shares(scheduler, held)
        if not self._fair:
            return
        shares: Counter[str] = Counter()
        for entry in batch.entries:
            # Count entries, not tokens: with a cached prefix, few tokens are computed.
            shares[scheduler.sequence_in(entry.slot).job_state.job.client] += 1
        self._shares.append((frozenset(scheduler._waiting), shares))
        self._passes += 1
        if len(self._shares) < WINDOW or self._passes % 8:
            return
        total = sum((shares for _, shares in self._shares), Counter())
        clients = frozenset(total).union(*(waiting for waiting, _ in self._shares))
        for client in frozenset.intersection(*(waiting for waiting, _ in self._shares)):
            share = total[client] / total.total()
            require(7, share >= 0.5 / len(clients), f"one of {len(clients)} clients got {share:.0%} of the entries")

    def _check_shares(self, scheduler: Scheduler, held: Counter[str]) -> None:
        """Check that no waiting client held less than its share, or nothing at all, for too many passes."""
        queued = {state.job.client for state in scheduler._jobs.values() if state.queued}
        waiting = {*scheduler._waiting, *queued}
        for counts in (self._below_share, self._without_slots):
            for client in set(counts) - waiting:
                del counts[client]
        for client in sorted(waiting):
            below = _is_below_share(client, held, self._sequences)
            self._below_share[client] = self._below_share[client] + 1 if below else 0
            self._without_slots[client] += not _group_slots(client, held)
            most = SHARE_PASSES + (RESUME_PASSES[1] if client in queued else 0)
            require(
                11, self._below_share[client] <= most, f"{client} holds {held[client]} while others hold {dict(held)}"
            )
            turns = (len(waiting | set(held))) * (TURN_PASSES + SHARE_PASSES)
            require(11, self._without_slots[client] <= turns, f"{client} holds nothing for {turns} passes")


def _group_slots(client: str, held: Counter[str]) -> int:
    """The slots that the client's group holds: those of all batches, or its own."""
    return sum(
        n
        for name, n in held.items()
        if name == client or (name.endswith(BATCH_CLIENT) and client.endswith(BATCH_CLIENT))
    )


def _is_below_share(client: str, held: Counter[str], sequences: int) -> bool:
    """Whether a client holds less than its share: another one holds 2 more, or batches hold more than half."""
    batch = client.endswith(BATCH_CLIENT)
    for other, count in held.items():
        if batch and other.endswith(BATCH_CLIENT):
            if count >= held[client] + 2:
                return True
        elif _group_slots(other, held) >= _group_slots(client, held) + 2:
            return True
    return not batch and _group_slots(BATCH_CLIENT, held) > max(1, sequences // 2)


class BucketModel:
    """An independent check of one rate limit of a key.

    Between any two times, the granted amount must not exceed the limit per minute plus the refill of that span.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._level = Fraction(0)
        self._lowest = Fraction(0)
        self._out = 0

    def take(self, amount: int, now: float) -> None:
        """Record a granted amount."""
        self._out += amount
        if self._limit is None:
            return
        spent = self._level + amount - Fraction(now) * self._limit / 60
        self._lowest = min(self._lowest, self._level - Fraction(now) * self._limit / 60)
        self._level += amount
        most = self._limit + Fraction(1, 1000)
        require(9, spent - self._lowest <= most, "more was granted than the limit per minute")

    def give(self, amount: int) -> None:
        """Record an amount that was given back."""
        require(9, 0 <= amount <= self._out, "more was given back than was taken")
        self._out -= amount
        self._level -= amount


@dataclass
class AccountModel:
    """An independent check of all limits of a key."""

    requests: BucketModel
    tokens: BucketModel
    most: int | None
    inside: int = 0

    @classmethod
    def of(cls, allowance: Allowance) -> AccountModel:
        return cls(BucketModel(allowance.requests), BucketModel(allowance.tokens), allowance.concurrent)

    def entered(self, now: float) -> None:
        """Record an admitted request."""
        self.inside += 1
        self.requests.take(1, now)
        require(9, self.most is None or self.inside <= self.most, "too many requests at once")


class ObservedEngine:
    """An engine that reports all jobs and steps to the checker."""

    def __init__(self, engine: Engine, checker: InvariantChecker) -> None:
        self._engine = engine
        self._checker = checker

    @property
    def model_info(self) -> ModelInfo:
        return self._engine.model_info

    async def tokenize(self, text: str, special: bool, client: str = "") -> tuple[int, ...]:
        return await self._engine.tokenize(text, special, client)

    def start(self, job: Job) -> JobHandle:
        run = self._engine.start(job)
        return ObservedJob(run, self._checker.add_job(job), self._checker)


class ObservedJob:
    """A job handle that reports all steps to the checker."""

    def __init__(self, run: JobHandle, record: JobRecord, checker: InvariantChecker) -> None:
        self._job = run
        self._record = record
        self._checker = checker

    async def __aiter__(self) -> AsyncIterator[Step]:
        try:
            async for step in self._job:
                self._checker.add_step(self._record, step)
                yield step
        except AfterwordError as error:
            self._checker.record("failed", self._record.name, type(error).__name__)
            self._checker.end_job(self._record, whole=False)
            raise
        self._checker.end_job(self._record, whole=True)

    def deliver_to(self, receive: Callable[[Step | Exception | None], None]) -> None:
        def observe(item: Step | Exception | None) -> None:
            if self._record.left:
                pass
            elif isinstance(item, Step):
                self._checker.add_step(self._record, item)
            else:
                if isinstance(item, AfterwordError):
                    self._checker.record("failed", self._record.name, type(item).__name__)
                self._checker.end_job(self._record, whole=item is None)
            receive(item)

        self._job.deliver_to(observe)

    def drop(self, sample: int) -> None:
        self._record.dropped.add(sample)
        self._job.drop(sample)

    def close(self) -> None:
        self._record.left = True
        self._job.close()
        self._checker.end_job(self._record, whole=False)

    def pause(self) -> None:
        self._checker.record("pauses", self._record.name)
        self._job.pause()

    def resume(self) -> None:
        self._job.resume()
