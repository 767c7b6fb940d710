"""Which sequences may be preempted, so that their slots go to another client. Pure functions without state.

Recomputation is bounded: a preempted sequence waits for about as many passes as its recomputation costs before it takes
a free slot. Then it samples some tokens before it can be preempted again. The oldest sequences of a client are
preempted last, so they always finish.
"""

from __future__ import annotations

from collections.abc import Collection

from afterword.engine.core.fair_share import TURN_PASSES, FairShare
from afterword.engine.core.prefill_queue import MIN_CHUNK
from afterword.engine.core.sequence import Sequence

# tokens sampled after the state of a preempted sample was computed again, before it can be preempted again
MIN_TOKENS_PER_TURN = 16
RESUME_PASSES = (32, 256)  # minimum and maximum of passes for which a preempted sample leaves free slots to others


def can_preempt(active: Collection[Sequence], fair_share: FairShare, passes: int) -> bool:
    """Whether any sequence may be preemptible: a cheap check before the clients are compared.

    `active`: the sequences that have slots. `passes`: the number of forward passes so far.
    """
    if fair_share.is_uneven or any(sequence.job_state.reader_is_behind for sequence in active):
        return True
    return fair_share.has_overdue(passes) and any(sequence.sampled_in_slot >= TURN_PASSES for sequence in active)


def preemption_victims(active: Collection[Sequence], fair_share: FairShare, client: str, passes: int) -> list[Sequence]:
    """The sequences that may be preempted for a client. The last one is preempted first."""
    overdue = fair_share.overdue(client, passes)
    found = [sequence for sequence in active if _can_be_preempted(sequence, fair_share, client, overdue)]
    return preemption_order(found, fair_share)


def preemption_order(sequences: Collection[Sequence], fair_share: FairShare) -> list[Sequence]:
    """Sequences, of which the last one is preempted first: the youngest of the client that holds most."""
    return sorted(
        sequences,
        key=lambda each: (
            each.job_state.reader_is_behind,
            *fair_share.load(each.job_state.job.client),
            each.job_state.job_id,
            each.sample,
        ),
    )


def _can_be_preempted(sequence: Sequence, fair_share: FairShare, client: str, overdue: bool) -> bool:
    if sequence.job_state.reader_is_behind or (overdue and sequence.sampled_in_slot >= TURN_PASSES):
        return True
    protected = sequence.paused and 0 < sequence.sampled_in_slot < MIN_TOKENS_PER_TURN
    return not protected and fair_share.exceeds(sequence.job_state.job.client, client)


def passes_to_wait(sequence: Sequence, grid: int) -> int:
    """For how many passes a preempted sequence leaves free slots to others: about what its recomputation costs."""
    cost = -(-sequence.computed // MIN_CHUNK) + (len(sequence.generated) if grid > 1 else 0)
    return min(max(cost, RESUME_PASSES[0]), RESUME_PASSES[1])
