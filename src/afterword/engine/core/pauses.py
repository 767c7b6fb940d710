"""Which sequences may be paused, so that their slots go to another client. Pure."""

from __future__ import annotations

from collections.abc import Collection

from afterword.engine.core.sequence import Sequence
from afterword.engine.core.shares import TURN, Shares

QUANTUM = 16  # tokens that a sample brings, after its state was computed again, before it can be paused again


def can_pause(held: Collection[Sequence], shares: Shares, passes: int) -> bool:
    """Whether it is worth asking for which client a sequence can be paused. `passes`: how many were made so far."""
    if shares.uneven or any(sequence.work.unread for sequence in held):
        return True
    return shares.late(passes) and any(sequence.brought >= TURN for sequence in held)


def victims(held: Collection[Sequence], shares: Shares, client: str, passes: int) -> list[Sequence]:
    """Sequences that may be paused for a client, the one to be paused first at the end."""
    late = shares.overdue(client, passes)
    found = [sequence for sequence in held if _gives_way(sequence, shares, client, late)]
    return sorted(
        found, key=lambda each: (each.work.unread, *shares.load(each.work.job.client), each.work.run, each.sample)
    )


def _gives_way(sequence: Sequence, shares: Shares, client: str, late: bool) -> bool:
    if sequence.work.unread or (late and sequence.brought >= TURN):
        return True
    protected = sequence.paused and 0 < sequence.brought < QUANTUM
    return not protected and shares.exceeds(sequence.work.job.client, client)
