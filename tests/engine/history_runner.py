"""A runner for tests: its logits depend on all tokens in a slot, and it checks every batch.

If the scheduler confuses slots, positions, copies or truncations, the tokens differ from those of `alone`, or an
assertion fails at once.
"""

from __future__ import annotations

import hashlib

import numpy as np

from afterword.engine.core.forward_batch import (
    BatchEntry,
    CopyPrefix,
    ForwardBatch,
    Logits,
    RestorePrefix,
    SaveState,
    SlotOperation,
    Truncate,
)
from afterword.engine.core.repetitions import Repetitions
from afterword.engine.core.sampler import Sampler, SampleTokens, ScoreQuery
from afterword.engine.core.sampler_chain import first_limit
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, SamplerChain, Token

VOCABULARY = 24


class HistoryRunner:
    """`state[slot]`: the tokens computed in a slot. `computed`: the number of tokens computed so far.

    Unless `can_truncate`, a slot is truncated only to lengths for which a snapshot was saved: `snapshots[number]` has
    the tokens of a slot at that time.
    """

    def __init__(
        self,
        slots: int,
        chunk: int,
        *,
        can_truncate: bool = True,
        grid: int = 1,
        min_shared_tokens: int = 2,
        max_snapshots: int = 0,
        capacity: int | None = None,
        joins_prompts: bool = False,
    ) -> None:
        self.slots = slots
        self.chunk = chunk
        self.grid = grid
        self.min_shared_tokens = min_shared_tokens
        self.joins_prompts = joins_prompts
        self.can_truncate = can_truncate
        self.max_snapshots = max_snapshots
        self.snapshots: dict[int, list[int]] = {}
        self.capacity = capacity
        self.memory: int | None = None  # tokens that the machine has memory for
        self.state: list[list[int]] = [[] for _ in range(slots)]
        self.computed = 0
        self.batches: list[ForwardBatch] = []

    def run(self, batch: ForwardBatch) -> Logits:
        self.batches.append(batch)
        for operation in batch.slot_operations:
            self._apply(operation)
        assert len({entry.slot for entry in batch.entries}) == len(batch.entries), "a slot is in one entry only"
        if len(batch.entries) > 1 and not self.joins_prompts:
            assert all(len(entry.tokens) == 1 for entry in batch.entries)
        rows = [logits for entry in batch.entries for logits in self._compute(entry)]
        held = sum(map(len, self.state))
        assert self.capacity is None or held <= self.capacity, f"the slots hold {held} tokens"
        return np.array(rows, np.float32).reshape(batch.outputs, VOCABULARY)

    def _apply(self, operation: SlotOperation) -> None:
        match operation:
            case SaveState(slot, number):
                assert 0 <= number < self.max_snapshots, "the number of snapshots is bounded"
                self.snapshots[number] = list(self.state[slot])
            case CopyPrefix(source, target, keep, number):
                self.state[target] = self._prefix(source, keep, number)
            case Truncate(slot, keep, number):
                self.state[slot] = self._prefix(slot, keep, number)
            case RestorePrefix(slot, keep, stored):
                assert isinstance(stored, tuple)
                assert keep == len(stored) or (self.can_truncate and keep < len(stored))
                self.state[slot] = list(stored[:keep])

    def _prefix(self, slot: int, keep: int, snapshot: int | None) -> list[int]:
        held = self.state[slot]
        assert keep <= len(held)
        if not self.can_truncate and 0 < keep < len(held):
            assert snapshot is not None, "a recurrent state cannot be truncated"
            assert self.snapshots[snapshot] == held[:keep], "a snapshot belongs to the slot's text"
        return held[:keep]

    def free_tokens(self) -> int | None:
        return None if self.memory is None else self.memory - sum(map(len, self.state))

    def cached_tokens(self, slot: int) -> int:
        return len(self.state[slot])

    def _compute(self, entry: BatchEntry) -> list[Logits]:
        state = self.state[entry.slot]
        assert len(state) == entry.position, "tokens are computed in order"
        assert 0 < len(entry.tokens) <= self.chunk
        assert len(entry.tokens) == 1 or entry.position % self.grid == 0, "chunks start on the grid"
        self.computed += len(entry.tokens)
        outputs = []
        for token in entry.tokens:
            state.append(token)
            outputs.append(logits_after(state))
        return outputs[len(entry.tokens) - entry.outputs :]


def logits_after(history: list[int]) -> Logits:
    """A logits row that depends on every token of the history. Shape: (VOCABULARY,)."""
    digest = hashlib.blake2b(bytes(history), digest_size=VOCABULARY).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32) / 32


def alone(job: Job, sample: int) -> list[int]:
    """The tokens of a sample, computed without a scheduler."""
    history, generated = list(job.prompt), []
    chain = job.sampling.chain or SamplerChain(())
    limits = [first_limit(chain) or 0.0]
    while len(generated) < job.max_tokens:
        repetitions = Repetitions(chain.dry, history) if chain.dry else None
        count = chain.last_n or 0
        recent = tuple(history[-count:]) if 0 < count < len(history) else ()
        counts = TokenCounts(generated)
        query = SampleTokens(job, (sample,), len(generated), counts, repetitions, [limits], recent=recent)
        ((token,),) = Sampler().read(logits_after(history)[None], [query])
        history.append(token.id)
        generated.append(token.id)
        if token.id in job.end_tokens:
            break
    return generated


def scores(job: Job) -> list[Token]:
    """The scores of a job's prompt tokens, computed without a scheduler; none if the job requests none."""
    if job.prompt_alternatives is None:
        return []
    rows = [logits_after(list(job.prompt[:end])) for end in range(1, len(job.prompt))]
    if not rows:
        return []
    queries = [ScoreQuery(token, job.prompt_alternatives, job.reported) for token in job.prompt[1:]]
    return [token for (token,) in Sampler().read(np.stack(rows), queries)]
