"""Prefixes move between slots and a store: any jobs, slots and delays of the store give the same tokens."""

from __future__ import annotations

import random

import pytest
from history_runner import HistoryRunner, alone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from afterword.engine.core import prefix_store
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.prefix_store import StoredState
from afterword.engine.core.slot import Slot
from afterword.engine.core.snapshots import TokenArray
from afterword.engine.protocol import Job, Sampling

PART, LEAST = 4, 8
Text = tuple[str, tuple[int, ...]]


class MemoryStore:
    """A store that takes and returns states at random times. A state is the tuple of a slot's tokens.

    It checks that the runner's slots and snapshots hold what the scheduler says when it may copy them.
    """

    token_bytes = 1
    is_writing = False

    def __init__(self, runner: HistoryRunner, texts: set[Text], seed: int) -> None:
        self.runner = runner
        self.texts = texts
        self.reads: list[tuple[int, str, tuple[int, ...]]] = []
        self.returned = 0
        self.random = random.Random(seed)

    def find(self, namespace: str, tokens: TokenArray) -> int:
        text = tuple(tokens.tolist())
        return max((each for each in range(LEAST, len(text) + 1) if (namespace, text[:each]) in self.texts), default=0)

    def fetch(self, ticket: int, namespace: str, tokens: TokenArray) -> None:
        self.reads.append((ticket, namespace, tuple(tokens.tolist())))

    def fetched(self) -> list[tuple[int, StoredState | None]]:
        done = [read for read in self.reads if self.random.random() < 0.5]
        self.reads = [read for read in self.reads if read not in done]
        return [(ticket, self._state(namespace, text)) for ticket, namespace, text in done]

    def _state(self, namespace: str, text: tuple[int, ...]) -> StoredState | None:
        if self.random.random() < 0.2:
            return None
        assert (namespace, text) in self.texts
        self.returned += 1
        return StoredState(len(text), text)

    def keep(self, slot: Slot, shared: frozenset[int]) -> bool:
        tokens = slot.tokens.tolist()
        assert self.runner.state[slot.index] == tokens, "a slot that may be copied has no pending operations"
        for length, number in slot.snapshots.items():
            assert self.runner.snapshots[number] == tokens[:length]
        if self.runner.can_truncate:
            lengths = set(range(LEAST, slot.reusable + 1, PART))
        else:
            lengths = {length for length in slot.snapshots if length >= LEAST}
        new = {(slot.namespace, tuple(tokens[:length])) for length in lengths} - self.texts
        if new and self.random.random() < 0.7:
            self.texts.add(min(new))
            return True
        return False

    def wait(self, seconds: float) -> None:
        assert seconds < 0.1


class ConstantRandom(random.Random):
    """Every read ends at once and succeeds, and a part is copied at once."""

    def random(self) -> float:
        return 0.4


def job(length: int, last: int, namespace: str, samples: int) -> Job:
    prompt = (*(index % 20 for index in range(length)), last)
    return Job(prompt, samples, 3, Sampling(temperature=0.0), (), bytes(16), namespace=namespace)


def loop_with(runner: HistoryRunner, texts: set[Text], seed: int | None) -> tuple[EngineLoop, MemoryStore]:
    store = MemoryStore(runner, texts, seed or 0)
    if seed is None:
        store.random = ConstantRandom()
    loop = EngineLoop(runner)
    loop.use_store(store)
    return loop, store


def runner_of(slots: int, can_truncate: bool, capacity: int | None = None, grid: int = 2) -> HistoryRunner:
    return HistoryRunner(
        *(slots, 8), can_truncate=can_truncate, max_snapshots=0 if can_truncate else 6, grid=grid, capacity=capacity
    )


jobs = st.builds(job, st.integers(1, 40), st.integers(0, 2), st.sampled_from(["", "a"]), st.integers(1, 3))


@pytest.fixture(autouse=True)
def short_parts(monkeypatch):
    monkeypatch.setattr(prefix_store, "PART_TOKENS", PART)
    monkeypatch.setattr(prefix_store, "MIN_STORED_TOKENS", LEAST)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lives=st.lists(st.lists(jobs, min_size=1, max_size=5), min_size=2, max_size=4),
    slots=st.integers(1, 4),
    can_truncate=st.booleans(),
    capacity=st.sampled_from([None, 50]),
    seed=st.integers(0, 1000),
)
def test_any_jobs_get_the_same_tokens_with_a_store(lives, slots, can_truncate, capacity, seed):
    texts: set[Text] = set()
    for life in lives:
        loop, _ = loop_with(runner_of(slots, can_truncate, capacity), texts, seed)
        found: dict[tuple[int, int], list[int]] = {}
        for name, each in enumerate(life):
            loop.start(name, each)
        while (passed := loop.step()) is not None:
            for name, step in passed.items():
                for sample, token in step.sampled:
                    found.setdefault((name, sample), []).append(token.id)
        loop.check()
        assert not loop.waits
        for (name, sample), tokens in found.items():
            assert tokens == alone(life[name], sample)
        assert len(found) == sum(each.samples for each in life)


@pytest.mark.parametrize("can_truncate", [True, False])
def test_a_stored_prefix_is_not_computed(can_truncate):
    texts: set[Text] = set()
    runners = [runner_of(2, can_truncate, grid=1) for _ in range(2)]
    for runner in runners:
        loop, store = loop_with(runner, texts, None)
        loop.start(0, job(40, 1, "", 1))
        while loop.step() is not None:
            pass
    assert runners[0].computed == 43
    assert runners[1].computed <= 7
    assert store.returned == 1


def test_a_closed_job_leaves_no_offer():
    runner = runner_of(2, can_truncate=True)
    loop, _ = loop_with(runner, {("", tuple(index % 20 for index in range(20)))}, None)
    loop.start(0, job(30, 1, "", 1))
    assert loop.waits
    loop.close(0)
    assert not loop.waits
    assert loop.step() is None
    assert runner.computed == 0
