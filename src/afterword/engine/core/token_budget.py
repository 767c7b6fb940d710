"""The tokens that all slots may hold together, where the memory of a machine is smaller than that of all full slots.

A sequence is admitted if the tokens that it has, and some that it will generate, fit beside those of the sequences that
have slots. Generated tokens can fill the rest. Then sequences are preempted until the next pass fits. Between two such
preemptions at least `GROWTH` tokens are generated, and a sequence that is alone always fits. So all sequences end.
Pure: the scheduler calls it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from afterword.engine.core.fair_share import FairShare
from afterword.engine.core.preemption import preemption_order
from afterword.engine.core.prefix_cache import PrefixCache
from afterword.engine.core.sequence import Sequence

GROWTH = 64  # tokens that an admitted sequence can generate before it may be preempted for memory


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """`slots`: state the most tokens that they may hold. `chunk`: the most tokens of one pass."""

    slots: PrefixCache
    chunk: int

    @property
    def capacity(self) -> int | None:
        """See `PrefixCache.capacity`."""
        return self.slots.capacity

    def victims(
        self, active: Collection[Sequence], candidates: list[Sequence], sequence: Sequence, *, needs_slot: bool
    ) -> list[Sequence] | None:
        """The sequences to preempt so that `sequence` gets a slot and memory; None if that is not possible.

        `candidates`: those that fair shares allow, the last one first. Memory that suspended sequences hold can always
        be taken: they compute nothing, for an unknown time.
        """
        if self.capacity is not None:
            candidates = candidates + [each for each in active if each.job_state.suspended and each not in candidates]
        for count in range(int(needs_slot), len(candidates) + 1):
            chosen = candidates[len(candidates) - count :]
            if self._fits([each for each in active if each not in chosen], sequence):
                return chosen[::-1]
        return None

    def excess(self, active: Collection[Sequence], fair_share: FairShare) -> list[Sequence]:
        """The sequences to preempt so that the next pass fits. At least one sequence stays."""
        if self.capacity is None:
            return []
        held = sum(each.computed for each in active)
        chosen = []
        order = sorted(preemption_order(active, fair_share), key=lambda each: each.job_state.suspended)
        for sequence in reversed(order[1:]):
            if held + self.chunk <= self.capacity:
                break
            held -= sequence.computed
            chosen.append(sequence)
        return chosen

    def _fits(self, active: list[Sequence], sequence: Sequence) -> bool:
        """Whether a sequence may get a slot beside the active ones."""
        if self.capacity is None or not active:
            return True
        # With the tokens of one pass left, the next pass cannot preempt what was just admitted.
        return sum(map(_expected_tokens, [*active, sequence])) + self.chunk <= self.capacity


def _expected_tokens(sequence: Sequence) -> int:
    """The tokens that a sequence holds soon: those that it has, and the next ones that it generates."""
    job = sequence.job_state.job
    return min(sequence.length + GROWTH, len(job.prompt) + job.max_tokens)
