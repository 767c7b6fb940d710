"""Which sequences may be preempted, so that their slots go to another client. Pure functions without state."""

from __future__ import annotations

from collections.abc import Collection

from afterword.engine.core.fair_share import TURN_PASSES, FairShare
from afterword.engine.core.sequence import Sequence

# tokens that a preempted sample generates after its state was computed again, before it can be preempted again
MIN_TOKENS_PER_TURN = 16


def can_preempt(active: Collection[Sequence], fair_share: FairShare, passes: int) -> bool:
    """Whether any sequence may be preemptible: a cheap check before the clients are compared.

    `active`: the sequences that have slots. `passes`: the number of forward passes so far.
    """
    if fair_share.is_uneven or any(sequence.job_state.reader_is_behind for sequence in active):
        return True
    return fair_share.has_overdue(passes) and any(sequence.generated_in_slot >= TURN_PASSES for sequence in active)


def preemption_victims(active: Collection[Sequence], fair_share: FairShare, client: str, passes: int) -> list[Sequence]:
    """The sequences that may be preempted for a client. The last one is preempted first."""
    overdue = fair_share.overdue(client, passes)
    found = [sequence for sequence in active if _can_be_preempted(sequence, fair_share, client, overdue)]
    return sorted(
        found,
        key=lambda each: (
            each.job_state.reader_is_behind,
            *fair_share.load(each.job_state.job.client),
            each.job_state.job_id,
            each.sample,
        ),
    )


def _can_be_preempted(sequence: Sequence, fair_share: FairShare, client: str, overdue: bool) -> bool:
    if sequence.job_state.reader_is_behind or (overdue and sequence.generated_in_slot >= TURN_PASSES):
        return True
    protected = sequence.paused and 0 < sequence.generated_in_slot < MIN_TOKENS_PER_TURN
    return not protected and fair_share.exceeds(sequence.job_state.job.client, client)
