"""Which sequences may be paused, so that their slots go to another client. Pure."""

from __future__ import annotations

from collections.abc import Collection

from afterword.engine.core.fair_share import TURN_PASSES, FairShare
from afterword.engine.core.sequence import Sequence

# tokens that a sample brings, after its state was computed again, before it can be paused again
MIN_TOKENS_PER_TURN = 16


def can_preempt(held: Collection[Sequence], fair_share: FairShare, passes: int) -> bool:
    """Whether it is worth asking for which client a sequence can be paused. `passes`: how many were made so far."""
    if fair_share.is_uneven or any(sequence.work.reader_is_behind for sequence in held):
        return True
    return fair_share.has_overdue(passes) and any(sequence.generated_in_slot >= TURN_PASSES for sequence in held)


def preemption_victims(held: Collection[Sequence], fair_share: FairShare, client: str, passes: int) -> list[Sequence]:
    """Sequences that may be paused for a client, the one to be paused first at the end."""
    late = fair_share.overdue(client, passes)
    found = [sequence for sequence in held if _can_be_preempted(sequence, fair_share, client, late)]
    return sorted(
        found,
        key=lambda each: (
            each.work.reader_is_behind,
            *fair_share.load(each.work.job.client),
            each.work.run,
            each.sample,
        ),
    )


def _can_be_preempted(sequence: Sequence, fair_share: FairShare, client: str, late: bool) -> bool:
    if sequence.work.reader_is_behind or (late and sequence.generated_in_slot >= TURN_PASSES):
        return True
    protected = sequence.paused and 0 < sequence.generated_in_slot < MIN_TOKENS_PER_TURN
    return not protected and fair_share.exceeds(sequence.work.job.client, client)
