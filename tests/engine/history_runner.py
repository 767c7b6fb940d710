"""A runner whose logits are a function of a slot's whole history, and which checks every batch that it is given.

If the scheduler mixes up slots, positions, forks or cuts, tokens come out different from `alone`, or an assertion
fails at once.
"""

from __future__ import annotations

import hashlib

import numpy as np

from afterword.engine.core.forward_batch import BatchEntry, CopyPrefix, ForwardBatch, Logits
from afterword.engine.core.sampler import Sampler, SampleTokens, ScoreQuery
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, Token

VOCABULARY = 24


class HistoryRunner:
    """State of a slot: the tokens computed in it."""

    def __init__(self, slots: int, chunk: int, can_truncate: bool = True, grid: int = 1, min_shared_tokens: int = 2) -> None:
        self.slots = slots
        self.chunk = chunk
        self.grid = grid
        self.min_shared_tokens = min_shared_tokens
        self.can_truncate = can_truncate
        self.state: list[list[int]] = [[] for _ in range(slots)]
        self.computed = 0
        self.batches: list[ForwardBatch] = []

    def run(self, batch: ForwardBatch) -> Logits:
        self.batches.append(batch)
        for move in batch.slot_operations:
            if isinstance(move, CopyPrefix):
                assert len(self.state[move.source]) >= move.keep
                assert self.can_truncate or len(self.state[move.source]) == move.keep
                self.state[move.target] = self.state[move.source][: move.keep]
            else:
                assert self.can_truncate or move.keep == 0
                del self.state[move.slot][move.keep :]
        assert batch.entries
        assert len({row.slot for row in batch.entries}) == len(batch.entries), "a slot is in one row only"
        if len(batch.entries) > 1:
            assert all(len(row.tokens) == 1 for row in batch.entries)
        rows = [logits for row in batch.entries for logits in self._compute(row)]
        return np.array(rows, np.float32).reshape(batch.outputs, VOCABULARY)

    def cached_tokens(self, slot: int) -> int:
        return len(self.state[slot])

    def _compute(self, row: BatchEntry) -> list[Logits]:
        state = self.state[row.slot]
        assert len(state) == row.position, "tokens are computed in order"
        assert 0 < len(row.tokens) <= self.chunk
        assert len(row.tokens) == 1 or row.position % self.grid == 0, "on the grid"
        self.computed += len(row.tokens)
        outputs = []
        for token in row.tokens:
            state.append(token)
            outputs.append(logits_after(state))
        return outputs[len(row.tokens) - row.outputs :]


def logits_after(history: list[int]) -> Logits:
    """A row of logits that depends on every token before it."""
    digest = hashlib.blake2b(bytes(history), digest_size=VOCABULARY).digest()
    return np.frombuffer(digest, np.uint8).astype(np.float32) / 32


def alone(job: Job, sample: int) -> list[int]:
    """A sample's tokens, computed without any scheduler."""
    history, generated = list(job.prompt), []
    while len(generated) < job.max_tokens:
        ask = SampleTokens(job, (sample,), len(generated), TokenCounts(generated))
        ((token,),) = Sampler().read(logits_after(history)[None], [ask])
        token = token.id
        history.append(token)
        generated.append(token)
        if token in job.end_tokens:
            break
    return generated


def scores(job: Job) -> list[Token]:
    """What a job is told about its prompt's tokens, computed without any scheduler."""
    if job.prompt_alternatives is None:
        return []
    rows = [logits_after(list(job.prompt[:end])) for end in range(1, len(job.prompt))]
    if not rows:
        return []
    asks = [ScoreQuery(token, job.prompt_alternatives) for token in job.prompt[1:]]
    return [token for (token,) in Sampler().read(np.stack(rows), asks)]
