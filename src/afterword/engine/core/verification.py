"""Verifies drafts: one pass computes the last token of a sequence and a draft of the tokens after it.

A drafted token is accepted if the sampler chooses it from the row before it, with that position's own seed and counts.
So a sequence gets the tokens that it would get one by one; the runner must compute the same numbers in both ways
(`Runner.grid` is 1). Rows after the first other token belong to another text and are ignored. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Runner
from afterword.engine.core.pass_costs import PassCosts
from afterword.engine.core.sampler import SampleTokens
from afterword.engine.core.sequence import Sequence
from afterword.engine.draft import Draft, OwnText, PredictedText, Prediction, ngram_places, prediction_draft
from afterword.engine.protocol import Job, Token

MIN_TOKENS = 4
"""The fewest tokens of a pass that verifies a draft."""

MOST_TOKENS = 64
"""The most tokens of such a pass. The cost of a token hardly falls beyond, and more of them would be rejected."""

TOKENS_PER_DECODE = 4
"""After a verification of this many tokens, sequences without drafts decode once before the next one."""

_MARGIN = 1.1  # how much faster than a decode a verification must be, because its acceptance is uncertain


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


_Drafted = tuple[Sequence, Draft, tuple[int, ...]]


class VerificationTurns:
    """Which sequence's draft is verified next, and when running sequences decode instead.

    A draft is verified where that takes less time for each token than a decode of all running sequences, as measured:
    a pass of many tokens takes less time for each of them, but only a share of a draft is accepted. While every running
    sequence has such a draft, they take turns. Else sequences decode between two verifications, so that those without
    drafts are not slowed down much. `most`: the most tokens of a pass.
    """

    def __init__(self, most: int) -> None:
        self._most = min(most, MOST_TOKENS)
        self._costs = PassCosts()
        self._turn = 0  # counts verifications
        self._decodes = 0  # that are left before the next verification

    def record_pass(self, batch: ForwardBatch, seconds: float) -> None:
        """Record the duration of a pass."""
        tokens = sum(len(entry.tokens) for entry in batch.entries)
        if batch.outputs == tokens:
            self._costs.record(tokens, seconds)

    def next_entry(self, running: list[Sequence]) -> BatchEntry | None:
        """The next verification, or None if the running sequences decode."""
        drafted = [found for each in running if (found := self._drafted(each))]
        ready = [found for found in drafted if self._pays(*found, len(running))]
        if not ready or (len(ready) < len(running) and self._decodes > 0):
            self._decodes -= 1
            for size in {1 + len(tokens) for _, _, tokens in drafted} if not ready else ():
                self._costs.fade(size)
            return None
        sequence, _, tokens = min(ready, key=lambda found: found[0].verified_turn)
        self._turn += 1
        sequence.verified_turn = self._turn
        self._decodes = (1 + len(tokens)) // TOKENS_PER_DECODE
        return sequence.verification_entry(tokens)

    def _drafted(self, sequence: Sequence) -> _Drafted | None:
        """A sequence with its draft and the tokens of it that can be verified."""
        draft = next((each for each in sequence.drafts if each.rest), None)
        if draft is None or not sequence.is_last:
            return None
        tokens = draft.rest[: min(self._most, sequence.tokens_left) - 1]
        return (sequence, draft, tokens) if 1 + len(tokens) >= MIN_TOKENS else None

    def _pays(self, _: Sequence, draft: Draft, tokens: tuple[int, ...], running: int) -> bool:
        """Whether a verification probably takes less time for each token than a decode of `running` sequences."""
        decode, verification = self._costs.of(running), self._costs.of(1 + len(tokens))
        if decode is None:
            return False  # the next decode measures it
        gained = (1 + draft.acceptance * len(tokens)) * decode
        return verification is None or gained >= _MARGIN * (1 + len(tokens)) * verification


def is_verification(sequence: Sequence, entry: BatchEntry) -> bool:
    """Whether an entry's tokens after the first are a draft."""
    return bool(sequence.generated) and entry.outputs > 1


def verification_queries(sequence: Sequence, entry: BatchEntry) -> Iterator[SampleTokens]:
    """The query for each row of a verification, as if the tokens before it had been generated one by one."""
    query = sequence.next_token([sequence.sample])
    counts, repetitions = query.generated, query.repetitions
    for index, token in enumerate(entry.tokens):
        if index and query.job.sampling.has_penalties:
            counts = counts.copy()
            counts.add(token)
        if index and repetitions is not None:
            repetitions = repetitions.copy()
            repetitions.add(token)
        position = query.position + index
        yield msgspec.structs.replace(query, position=position, generated=counts, repetitions=repetitions)


def confirmed_tokens(job: Job, entry: BatchEntry, found: list[list[Token]]) -> list[Token]:
    """The tokens that a verification generates: up to the first that ends the sample or differs from the draft."""
    tokens: list[Token] = []
    for (token,), drafted in zip(found, (*entry.tokens[1:], None), strict=True):
        tokens.append(token)
        if token.id != drafted or token.id in job.end_tokens:
            break
    return tokens
