"""Verifies drafts: one pass computes the last token of a sequence and a draft of the tokens after it.

A drafted token is accepted if the sampler chooses it from the row before it, with that position's own seed and counts.
So a sequence gets the tokens that it would get one by one; the runner must compute the same numbers in both ways
(`Runner.grid` is 1). Rows after the first other token belong to another text and are ignored. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

from afterword.engine.core.forward_batch import BatchEntry, Runner
from afterword.engine.core.sampler import SampleTokens
from afterword.engine.core.sequence import Sequence
from afterword.engine.draft import Draft, OwnText, PredictedText, Prediction, ngram_places, prediction_draft
from afterword.engine.protocol import Job, Token

MIN_COLUMNS = 4
"""The fewest tokens that are verified in one pass."""

COLUMNS_PER_SEQUENCE = 2
"""A verification computes at least this many tokens for each sequence that runs. A pass costs the less per token the
more tokens it has. So a verification costs no more per token than a decode, even if half of its tokens are rejected."""

TOKENS_PER_DECODE = 4
"""After a verification of this many tokens, sequences without drafts decode once before the next one."""


def can_verify(runner: Runner) -> bool:
    """Whether drafts can be verified: a token has the same numbers in any pass, and rejected tokens can be removed."""
    return runner.grid == 1 and runner.can_truncate


class DraftMaker:
    """Makes the drafts of a job's samples. `ngrams`: whether drafts are copied from a sample's own text too."""

    def __init__(self, job: Job, ngrams: bool) -> None:
        self._job = job
        self._predicted = PredictedText(job.prediction)
        self._places = ngram_places(job.prompt) if ngrams and job.max_tokens > 1 else None

    def drafts(self) -> tuple[Draft, ...]:
        """The drafts of one sample, in the order in which they are preferred."""
        job = self._job
        found = [prediction_draft(Prediction(self._predicted), job.max_tokens)] if job.prediction else []
        if self._places is not None:
            found.append(Draft(OwnText(job.prompt, self._places), job.max_tokens))
        return tuple(found)


class VerificationTurns:
    """Which sequence's draft is verified next, and when running sequences decode instead.

    While every running sequence has a long draft, they take turns. Else sequences decode between two verifications, so
    that those without drafts are not slowed down much. `most`: the most tokens of a pass.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turn = 0  # counts verifications
        self._decodes = 0  # that are left before the next verification

    def next_entry(self, running: list[Sequence]) -> BatchEntry | None:
        """The next verification, or None if the running sequences decode."""
        least = max(MIN_COLUMNS, COLUMNS_PER_SEQUENCE * len(running))
        drafts = [(each, each.draft_tokens(self._most - 1)) for each in running if each.drafts and each.is_last]
        ready = [(sequence, tokens) for sequence, tokens in drafts if len(tokens) + 1 >= least]
        if not ready or (len(ready) < len(running) and self._decodes > 0):
            self._decodes -= 1
            return None
        sequence, tokens = min(ready, key=lambda pair: pair[0].verified_turn)
        self._turn += 1
        sequence.verified_turn = self._turn
        entry = sequence.verification_entry(tokens)
        self._decodes = len(entry.tokens) // TOKENS_PER_DECODE
        return entry


def is_verification(sequence: Sequence, entry: BatchEntry) -> bool:
    """Whether an entry's tokens after the first are a draft."""
    return bool(sequence.generated) and entry.outputs > 1


def verification_queries(sequence: Sequence, entry: BatchEntry) -> Iterator[SampleTokens]:
    """The query for each row of a verification, as if the tokens before it had been generated one by one."""
    job, counts = sequence.job_state.job, sequence.token_counts
    for index, token in enumerate(entry.tokens):
        if index and job.sampling.has_penalties:
            counts = counts.copy()
            counts.add(token)
        yield SampleTokens(job, [sequence.sample], len(sequence.generated) + index, counts)


def confirmed_tokens(job: Job, entry: BatchEntry, found: list[list[Token]]) -> list[Token]:
    """The tokens that a verification generates: up to the first that ends the sample or differs from the draft."""
    tokens: list[Token] = []
    for (token,), drafted in zip(found, (*entry.tokens[1:], None), strict=True):
        tokens.append(token)
        if token.id != drafted or token.id in job.end_tokens:
            break
    return tokens
