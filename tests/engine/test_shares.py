"""What a client holds while another waits; and that a sample that is paused for it brings the same as undisturbed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import pytest
from history import HistoryRunner, alone, scores
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_loop import finish, jobs, sampled, shapes

from afterword.engine.core import scheduler, shares
from afterword.engine.core.loop import Loop
from afterword.engine.protocol import Job, Load, Step

SLOTS = 16
SOON = 3  # passes until a short request begins while no sample is protected from a pause

clients = st.sampled_from(["one", "two", "three", "one batch", "two batch"])
crowded = st.builds(
    lambda each, client, samples, max_tokens: msgspec.structs.replace(
        each, client=client, samples=samples, max_tokens=max_tokens
    ),
    jobs,
    clients,
    st.integers(1, 6),
    st.integers(0, 24),
)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples are paused again after a few tokens, so that short ones are paused several times."""
    monkeypatch.setattr(scheduler, "QUANTUM", 2)
    monkeypatch.setattr(scheduler, "REST", (1, 3))
    monkeypatch.setattr(scheduler, "TURN", 4)
    monkeypatch.setattr(shares, "TURN", 4)


@dataclass
class Crowd:
    """A loop, what each run brought, and in which pass each began."""

    loop: Loop
    runner: HistoryRunner
    steps: dict[int, list[Step]] = field(default_factory=lambda: defaultdict(list))
    began: dict[int, int] = field(default_factory=dict)

    def step(self) -> bool:
        """Compute a pass, or let jobs begin; whether there was anything to do."""
        passed = self.loop.step()
        for run, step in (passed or {}).items():
            self.steps[run].append(step)
            self.began.setdefault(run, len(self.runner.batches))
        return passed is not None

    def passes(self, count: int) -> None:
        end = len(self.runner.batches) + count
        while len(self.runner.batches) < end:
            assert self.step(), "idle"

    def wait_for(self, run: int) -> int:
        """Passes until a run begins."""
        start = len(self.runner.batches)
        while run not in self.began:
            assert self.step(), "idle"
        return self.began[run] - start

    def held(self) -> Counter[str]:
        """Sequences of each client in the last pass."""
        return Counter(sequence.work.job.client for sequence in self.loop._scheduler._held.values())

    def check(self, wanted: dict[int, Job]) -> None:
        """Everything brought is what each job has alone."""
        for run, each in wanted.items():
            for sample in range(each.samples):
                assert sampled(self.steps[run], sample) == alone(each, sample)
            assert [token for step in self.steps[run] for token in step.scored] == scores(each)


def crowd(slots: int = SLOTS, chunk: int = 16, grid: int = 1, rewinds: bool = True) -> Crowd:
    runner = HistoryRunner(slots, chunk, grid=grid, rewinds=rewinds)
    return Crowd(Loop(runner), runner)


def run_all(loop: Loop, wanted: list[Job], pauses: Iterator[int]) -> dict[int, list[Step]]:
    """Jobs that arrive so many steps after one another."""
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    for run, each in enumerate(wanted):
        loop.start(run, each)
        for _ in range(next(pauses)):
            for name, step in (loop.step() or {}).items():
                steps[name].append(step)
            loop._scheduler.check()
    for name, more in finish(loop).items():
        steps[name] += more
    return steps


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(crowded, min_size=2, max_size=8), st.integers(1, 5), st.integers(3, 8), shapes, st.data())
def test_paused_samples_bring_what_they_bring_alone(hurried, wanted, slots, chunk, shape, data):
    runner = HistoryRunner(slots, chunk, grid=shape[0], rewinds=shape[1])
    loop = Loop(runner)
    steps = run_all(loop, wanted, iter(lambda: data.draw(st.integers(0, 12)), None))
    for run, each in enumerate(wanted):
        ended = dict(end for step in steps[run] for end in step.ended)
        assert sorted(ended) == list(range(each.samples))
        for sample in range(each.samples):
            assert sampled(steps[run], sample) == alone(each, sample)
        assert [token for step in steps[run] for token in step.scored] == scores(each)
    assert loop.load() == Load(slots, 0, 0)
    loop.check()


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(crowded, min_size=2, max_size=8), st.integers(1, 4), shapes, st.data())
def test_paused_samples_can_be_dropped_and_closed(hurried, wanted, slots, shape, data):
    runner = HistoryRunner(slots, 4, grid=shape[0], rewinds=shape[1])
    loop = Loop(runner)
    for run, each in enumerate(wanted):
        loop.start(run, each)
    disturbed: set[int] = set()
    steps: defaultdict[int, list[Step]] = defaultdict(list)
    while (passed := loop.step()) is not None:
        for run, step in passed.items():
            steps[run].append(step)
        act = data.draw(st.sampled_from(["none"] * 6 + ["close", "drop"]))
        run = data.draw(st.integers(0, len(wanted) - 1))
        if act == "close":
            loop.close(run)
            disturbed.add(run)
        elif act == "drop":
            loop.drop(run, data.draw(st.integers(0, 5)))
            disturbed.add(run)
        loop._scheduler.check()
    for run, each in enumerate(wanted):
        for sample in range(each.samples):
            got, expected = sampled(steps[run], sample), alone(each, sample)
            assert got == expected[: len(got)]
            assert run in disturbed or got == expected
    assert loop.load() == Load(slots, 0, 0)
    loop.check()
