"""Checks, for tests, that the scheduler's tables agree about sequences and slots."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from afterword.engine.core.fair_share import FairShare
from afterword.engine.core.sequence import Sequence
from afterword.engine.core.slot import Slot


def check_sequences(
    slots: Iterable[Slot], active: Mapping[Slot, Sequence], fair_share: FairShare, prefill_queue: Iterable[Sequence]
) -> None:
    """Raise `AssertionError` if two tables disagree. `active`: the sequences that have slots."""
    assert {slot for slot in slots if slot.in_use} == set(active), "a slot is used by one sequence"
    clients = [sequence.job_state.job.client for sequence in active.values()]
    assert all(fair_share.load(each)[1] == clients.count(each) for each in clients), "shares are counted"
    for slot, sequence in active.items():
        assert sequence.slot is slot
        assert sequence in sequence.job_state.live
        assert tuple(slot.tokens.tolist()) == sequence.slice(0, slot.length), "a slot holds its sequence's tokens"
    assert set(prefill_queue) == {sequence for sequence in active.values() if sequence.needs_prefill}
