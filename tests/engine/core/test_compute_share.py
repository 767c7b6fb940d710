"""Tests of the share of compute time that each client gets, on a clock that only forward passes advance."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from history_runner import HistoryRunner
from test_engine_loop import job

from afterword.engine.core.compute_share import ALLOWED_EXCESS, ComputeShare
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.core.sampler import Sampler
from afterword.engine.protocol import BATCH_CLIENT, Job

TOKEN, PASS = 0.001, 0.004  # seconds per token, and additional seconds per pass


class TimedRunner(HistoryRunner):
    """A runner that advances a clock in each pass. `spent`: seconds by client; the entries of a pass count equally."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots, chunk=64)
        self.now = 0.0
        self._job_ids = itertools.count()
        self.spent: Counter[str] = Counter()
        self.loop = EngineLoop(self, clock=lambda: self.now)

    def run(self, batch: ForwardBatch) -> Logits:
        seconds = PASS + TOKEN * sum(len(row.tokens) for row in batch.entries)
        self.now += seconds
        for row in batch.entries:
            self.spent[self.loop._scheduler.sequence_in(row.slot).job_state.job.client] += seconds / len(batch.entries)
        return super().run(batch)

    def start(self, *jobs: Job) -> None:
        for each in jobs:
            self.loop.start(next(self._job_ids), each)

    def run_for(self, seconds: float) -> Counter[str]:
        """Run for this many seconds and return the seconds that each client got."""
        before, end = self.spent.copy(), self.now + seconds
        while self.now < end:
            assert self.loop.step() is not None, "idle"
        return self.spent - before


def stream(client: str) -> Job:
    """A job that generates tokens for longer than any of these tests runs."""
    return job(prompt=(1, 2, 3), max_tokens=200, client=client)


def long_prompt(client: str, first: int = 7, scored: int | None = None) -> Job:
    return job(prompt=(first, *[7] * 190), max_tokens=0 if scored else 1, client=client, prompt_alternatives=scored)


@pytest.mark.parametrize("scored", [None, 2])
def test_long_prompts_of_one_client_leave_half_of_the_time_to_another_client(scored):
    runner = TimedRunner(slots=4)
    runner.start(stream("good"), *(long_prompt("hostile", first, scored) for first in range(8)))
    runner.run_for(0.3)
    spent = runner.run_for(0.6)
    assert spent["good"] / spent.total() == pytest.approx(0.5, abs=0.1)


def test_the_time_of_the_sampler_is_charged():
    class SlowSampler(Sampler):
        def read(self, logits, queries):
            runner.now += 5.0
            return super().read(logits, queries)

    runner = TimedRunner(slots=4)
    runner.loop._sampler = SlowSampler()
    runner.start(stream("other"))
    runner.run_for(10)
    runner.start(long_prompt("hostile"))
    share = runner.loop._scheduler._prefill_queue.compute_share
    while not share.excess("hostile"):
        runner.loop.step()
    assert share.excess("hostile") > 5


def test_one_of_three_clients_gets_a_third_of_the_time_for_long_prompts():
    runner = TimedRunner(slots=8)
    runner.start(stream("good"), stream("well"), *(long_prompt("hostile", first) for first in range(8)))
    runner.run_for(0.3)
    spent = runner.run_for(0.6)
    assert spent["hostile"] / spent.total() == pytest.approx(1 / 3, abs=0.1)


def test_one_of_many_clients_gets_a_third_of_the_time_for_its_prompts():
    runner = TimedRunner(slots=12)
    runner.start(*(stream(f"good {number}") for number in range(9)), long_prompt("long"), long_prompt("long", 8))
    runner.run_for(0.2)
    spent = runner.run_for(0.4)
    assert spent["long"] / spent.total() == pytest.approx(1 / 3, abs=0.1)


def test_many_short_prompts_of_one_client_leave_time_to_other_clients():
    """Each prompt is computed in its own pass, of one token beyond the cached prefix, and holds one slot."""
    runner = TimedRunner(slots=8)
    tail = [job(prompt=(*[7] * 60, number), max_tokens=0, prompt_alternatives=1, client="a") for number in range(23)]
    runner.start(*(stream("good") for _ in range(4)), *(stream("well") for _ in range(4)), *(tail * 6))
    runner.run_for(0.3)
    spent = runner.run_for(0.4)
    assert spent["a"] / spent.total() <= 0.4
    assert len([each for each in runner.loop._scheduler._active.values() if each.job_state.job.client == "a"]) <= 1


def test_a_single_client_does_not_wait():
    runner = TimedRunner(slots=4)
    runner.start(stream("a"), *(long_prompt("a", first) for first in range(4)))
    spent = runner.run_for(0.5)
    assert all(len(batch.entries) == 1 for batch in runner.batches[:8])
    assert spent.total() >= 0.5
    assert runner.loop._scheduler._prefill_queue.compute_share.excess("a") == 0


def test_paused_clients_are_not_waited_for():
    runner = TimedRunner(slots=4)
    runner.start(stream("paused"), *(long_prompt("a", first) for first in range(4)))
    runner.run_for(0.2)
    runner.loop.pause(0)
    spent = runner.run_for(0.4)
    assert spent.total() == spent["a"]
    while runner.loop.step() is not None:
        pass
    assert runner.loop.load().running == 1


def test_prompts_of_batches_do_not_wait_for_other_batches():
    """Time that batches use does not reduce their common debt. Only the paused client could reduce it."""
    runner = TimedRunner(slots=4)
    runner.start(
        stream("paused"), stream("b" + BATCH_CLIENT), *(long_prompt("a" + BATCH_CLIENT, first) for first in range(2))
    )
    runner.run_for(0.15)
    runner.loop.pause(0)
    before = runner.spent["a" + BATCH_CLIENT]
    runner.run_for(0.25)
    assert runner.spent["a" + BATCH_CLIENT] > before + 0.1


def test_a_paused_prompt_does_not_block_other_requests_of_its_client():
    runner = TimedRunner(slots=4)
    runner.start(stream("other"), long_prompt("a"))
    while not runner.loop._scheduler._prefill_queue.compute_share.excess("a"):
        runner.loop.step()
    runner.loop.pause(1)
    runner.loop.close(0)
    runner.start(job(prompt=(4, 5), max_tokens=1, client="a"))
    while runner.loop.step() is not None:
        pass
    assert (runner.loop.load().waiting, runner.loop.load().running) == (0, 1)


def test_equal_times_leave_no_excess():
    shares = ComputeShare()
    for _ in range(100):
        shares.charge(["a"], 1.0, ["a", "b"])
        shares.charge(["b"], 1.0, ["a", "b"])
    assert shares.excess("a") <= 1.0
    assert shares.excess("b") <= 1.0
    shares.charge(["a", "b"], 10.0, ["a", "b"])
    assert max(shares.excess("a"), shares.excess("b")) <= 1.0


def test_a_client_owes_nothing_when_no_other_client_is_left():
    shares = ComputeShare()
    shares.charge(["a"], ALLOWED_EXCESS, ["a", "b"])
    assert shares.excess("a") == ALLOWED_EXCESS
    shares.charge(["a"], ALLOWED_EXCESS, ["a"])
    assert shares.excess("a") == 0


def test_all_batches_have_a_common_excess():
    shares = ComputeShare()
    shares.charge(["a" + BATCH_CLIENT], 1.0, ["a" + BATCH_CLIENT, "b" + BATCH_CLIENT, "c"])
    assert shares.excess("a" + BATCH_CLIENT) == shares.excess("b" + BATCH_CLIENT) == 1.0
    assert shares.excess("a") == 0
