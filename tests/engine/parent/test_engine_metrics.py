"""Tests of the engine's counters and histograms, with a simulated clock."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from afterword.engine.parent.engine_metrics import EngineMetrics, JobTimer
from afterword.engine.protocol import Job, PassStats, Sampling, Step, Token
from afterword.observability.histogram import Histogram

TOKEN = Token(1)


@dataclass
class TimedJob:
    """A job that is accepted at 100 s."""

    samples: int = 1
    engine_metrics: EngineMetrics = field(default_factory=EngineMetrics)
    now: float = 100.0
    whole: bool = False

    def __post_init__(self) -> None:
        job = Job((1, 2, 3), self.samples, 10, Sampling(), (), bytes(16), whole=self.whole)
        self.timer = JobTimer(self.engine_metrics, job, self.now, lambda: self.now)

    def at(self, now: float, *samples: int, cached: int = 0) -> TimedJob:
        """Record a step at the time `now`, with one token for each of these samples."""
        self.now = now
        self.timer.record_step(Step(sampled=tuple((sample, TOKEN) for sample in samples), cached=cached))
        return self


def test_a_number_is_in_the_first_bucket_that_it_does_not_exceed():
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 2.0, 2.5, 100.0):
        histogram.add(number)
    assert histogram.counts == [2, 2, 2]
    assert histogram.sum == 107.5


def test_the_phases_of_a_job_are_measured():
    timed = TimedJob().at(103).at(105, 0).at(105.5, 0).at(107, 0)
    timed.timer.record_end()
    engine_metrics = timed.engine_metrics
    assert (
        engine_metrics.queued.sum,
        engine_metrics.prefill.sum,
        engine_metrics.decode.sum,
        engine_metrics.inter_token_seconds.sum,
    ) == (3, 2, 2, 2)
    assert [
        sum(each.counts)
        for each in (
            engine_metrics.queued,
            engine_metrics.prefill,
            engine_metrics.decode,
            engine_metrics.inter_token_seconds,
        )
    ] == [1, 1, 1, 2]
    assert (engine_metrics.prompt_tokens, engine_metrics.cached_tokens, engine_metrics.generated_tokens) == (3, 0, 3)


def test_the_time_between_tokens_is_measured_for_each_sample():
    timed = TimedJob(samples=2).at(101, cached=2).at(102, 0, 1).at(103, 0).at(109, 0, 1)
    assert timed.engine_metrics.inter_token_seconds.sum == (103 - 102) + (109 - 103) + (109 - 102)
    assert timed.engine_metrics.generated_tokens == 5
    assert timed.engine_metrics.cached_tokens == 2


def test_a_job_without_generated_tokens_has_no_decode_time():
    timed = TimedJob().at(104)
    timed.now = 106
    timed.timer.record_end()
    assert timed.engine_metrics.prefill.sum == 2
    assert sum(timed.engine_metrics.decode.counts) == 0


def test_a_job_that_never_started_is_not_counted():
    engine_metrics = TimedJob().engine_metrics
    assert sum(engine_metrics.queued.counts) == engine_metrics.prompt_tokens == 0


def test_passes_are_counted_by_kind_and_empty_statistics_are_ignored():
    engine_metrics = EngineMetrics()
    for pass_stats in (
        PassStats(used_tokens=5),
        PassStats(True, 64, 0.25),
        PassStats(False, 3, 0.5),
        PassStats(False, 4, 0.5, drafted_tokens=3, accepted_tokens=2),
    ):
        engine_metrics.record_pass(pass_stats)
    assert (engine_metrics.prompts.tokens.sum, engine_metrics.prompts.seconds.sum) == (64, 0.25)
    assert (engine_metrics.generation.tokens.sum, engine_metrics.generation.seconds.sum) == (7, 1.0)
    assert sum(engine_metrics.generation.tokens.counts) == 2
    assert (engine_metrics.drafted_tokens, engine_metrics.accepted_tokens) == (3, 2)


@pytest.mark.parametrize("whole", [False, True])
def test_tokens_that_are_reported_together_took_the_same_time_each(whole):
    """A verified draft of a stream is several tokens too, and has the numbers of the same draft of a whole response."""
    timed = TimedJob(samples=2, whole=whole).at(101, 0, 1).at(105, 0, 0, 0, 0, 1)
    gaps = timed.engine_metrics.inter_token_seconds
    assert (sum(gaps.counts), gaps.sum) == (5, 4 * 1.0 + 4.0)
    assert gaps.counts[gaps.bounds.index(1.0)] == 4
    assert gaps.counts[gaps.bounds.index(5.0)] == 1
    assert timed.engine_metrics.generated_tokens == 7


def test_tokens_of_one_sample_that_are_reported_together_leave_the_others_alone():
    timed = TimedJob(samples=3).at(101, 0, 1, 2).at(103, 0, 0).at(104, 1)
    gaps = timed.engine_metrics.inter_token_seconds
    assert (sum(gaps.counts), gaps.sum) == (3, 2 * 1.0 + 3.0)
