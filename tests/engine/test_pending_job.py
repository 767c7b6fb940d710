"""Who is to blame for an engine's death: a job that comes no further than before."""

from __future__ import annotations

from afterword.engine.parent.engine_metrics import EngineMetrics, JobTimer
from afterword.engine.parent.pending_job import MAX_CRASHES, PendingJob
from afterword.engine.protocol import Job, Sampling, Step, Token


class Keeper:
    """Has nobody to tell."""

    def drop(self, pending: PendingJob, sample: int) -> None:
        """End one sample."""

    def end(self, pending: PendingJob) -> None:
        """Forget a job."""


def accepted(samples: int) -> PendingJob:
    job = Job((1, 2), samples, 9, Sampling(), (), bytes(16))
    return PendingJob(Keeper(), 0, job, 0.0, JobTimer(EngineMetrics(), job, 0.0, lambda: 0.0))


def brings(*samples: int) -> Step:
    """A token for each of these samples."""
    return Step(sampled=tuple((sample, Token(5)) for sample in samples))


def died(run: PendingJob, times: int) -> PendingJob:
    """An engine after the other died when the first sample had two tokens and the second one."""
    run.add_step(brings(0, 1))
    run.add_step(brings(0))
    for _ in range(times):
        run.restart(blamed=True)
        run.add_step(brings(0, 1))
        run.add_step(brings(0))
    return run


def test_a_sample_that_comes_further_clears_itself_alone() -> None:
    run = died(accepted(2), MAX_CRASHES)
    assert (run.crashes, run.on_probation) == (MAX_CRASHES, True)
    run.add_step(brings(1))
    assert run.on_probation, "it may still be the first sample that kills"
    run.add_step(brings(0))
    assert (run.crashes, run.on_probation) == (0, False)


def test_a_sample_that_has_ended_or_had_not_begun_is_not_waited_for() -> None:
    run = died(accepted(3), MAX_CRASHES)
    run.add_step(Step(ended=((1, "stop"),)))
    run.add_step(brings(0))
    assert run.crashes == 0
