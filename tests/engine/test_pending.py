"""Who is to blame for an engine's death: a job that comes no further than before."""

from __future__ import annotations

from afterword.engine.pending import CRASHES, Pending
from afterword.engine.protocol import Job, Sampling, Step, Token
from afterword.engine.tally import Course, Tally


class Keeper:
    """Has nobody to tell."""

    def drop(self, pending: Pending, sample: int) -> None:
        """End one sample."""

    def end(self, pending: Pending) -> None:
        """Forget a job."""


def accepted(samples: int) -> Pending:
    job = Job((1, 2), samples, 9, Sampling(), (), bytes(16))
    return Pending(Keeper(), 0, job, 0.0, Course(Tally(), job, 0.0, lambda: 0.0))


def brings(*samples: int) -> Step:
    """A token for each of these samples."""
    return Step(sampled=tuple((sample, Token(5)) for sample in samples))


def died(run: Pending, times: int) -> Pending:
    """An engine after the other died when the first sample had two tokens and the second one."""
    run.put(brings(0, 1))
    run.put(brings(0))
    for _ in range(times):
        run.lost(blamed=True)
        run.put(brings(0, 1))
        run.put(brings(0))
    return run


def test_a_sample_that_comes_further_clears_itself_alone() -> None:
    run = died(accepted(2), CRASHES)
    assert (run.crashes, run.on_probation) == (CRASHES, True)
    run.put(brings(1))
    assert run.on_probation, "it may still be the first sample that kills"
    run.put(brings(0))
    assert (run.crashes, run.on_probation) == (0, False)


def test_a_sample_that_has_ended_or_had_not_begun_is_not_waited_for() -> None:
    run = died(accepted(3), CRASHES)
    run.put(Step(ended=((1, "stop"),)))
    run.put(brings(0))
    assert run.crashes == 0
