"""Verifies drafts: one pass computes the last token of a sequence and a draft of the tokens after it.

A drafted token is accepted if the sampler chooses it from the row before it, with that position's own seed and counts.
So a sequence gets the tokens that it would get one by one; the runner must compute the same numbers in both ways
(`Runner.grid` is 1). Rows after the first other token belong to another text and are ignored. Pure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import msgspec

from afterword.engine.core.forward_batch import BatchEntry, ForwardBatch, Runner
from afterword.engine.core.pass_costs import PassCosts
from afterword.engine.core.sampler import SampleTokens
from afterword.engine.core.sequence import Sequence
from afterword.engine.draft import (
    LENGTHS,
    PROBE,
    Draft,
    ModelDraft,
    PredictedText,
    Prediction,
    ngram_places,
    own_text_draft,
    prediction_draft,
)
from afterword.engine.protocol import Job, Token

MIN_TOKENS = 4
"""The fewest tokens of a pass that verifies a draft."""

MOST_TOKENS = 64
"""The most tokens of such a pass. The cost of a token hardly falls beyond, and more of them would be rejected."""

TOKENS_PER_DECODE = 4
"""After a verification of this many tokens, sequences without drafts decode once before the next one."""

# In shorter samples no draft from their own text comes to be verified: a token, the probe and the draft that are
# generated one by one, and a verification.
_OWN_TEXT_TOKENS = 1 + PROBE + LENGTHS[0] + MIN_TOKENS

_MARGIN = 1.1  # how much faster than a decode a verification must be, because its acceptance is uncertain


def can_verify(runner: Runner) -> bool:
    """Whether drafts can be verified: a token has the same numbers in any pass, and rejected tokens can be removed."""
    return runner.grid == 1 and runner.can_truncate


class DraftMaker:
    """Makes the drafts of a job's samples.

    `ngrams`: whether drafts are copied from a sample's own text too. `model`: whether a draft model computes some.
    """

    def __init__(self, job: Job, ngrams: bool, model: bool) -> None:
        self._job = job
        self._model = model
        self._predicted = PredictedText(job.prediction)
        self._places = ngram_places(job.prompt) if ngrams and job.max_tokens >= _OWN_TEXT_TOKENS else None

    def drafts(self) -> tuple[Draft | ModelDraft, ...]:
        """The drafts of one sample, in the order in which they are preferred: the model's cost most."""
        job = self._job
        found: list[Draft | ModelDraft] = []
        if job.prediction:
            found.append(prediction_draft(Prediction(self._predicted), job.max_tokens))
        if self._places is not None:
            found.append(own_text_draft(job.prompt, self._places, job.max_tokens))
        if self._model:
            found.append(ModelDraft(job.max_tokens))
        return tuple(found)


@dataclass(frozen=True, slots=True)
class WantedDraft:
    """A draft of `count` tokens that a draft model should compute for a sequence."""

    sequence: Sequence
    draft: ModelDraft
    count: int


class DraftSource(Protocol):
    """A draft model. `costs`: of its passes of one token of each sequence."""

    costs: PassCosts

    def can_draft(self, wanted: WantedDraft) -> bool:
        """Whether it can compute a draft, perhaps after more of the text was read."""
        ...

    def follows(self, wanted: WantedDraft) -> bool:
        """Whether it has read enough of the text."""
        ...


def model_draft(sequence: Sequence) -> ModelDraft | None:
    """The drafts of a draft model for a sequence; None if it gets none, or no more."""
    found = next((each for each in sequence.drafts if isinstance(each, ModelDraft)), None)
    return None if found is None or found.dropped else found


_Drafted = tuple[Sequence, Draft | ModelDraft, tuple[int, ...]]


class VerificationTurns:
    """Which sequence's draft is verified next, and when running sequences decode instead.

    A draft is verified where that takes less time for each token than a decode of all running sequences, as measured:
    a pass of many tokens takes less time for each of them, but only a share of a draft is accepted. While every running
    sequence has such a draft, they take turns. Else sequences decode between two verifications, so that those without
    drafts are not slowed down much. `most`: the most tokens of a pass.

    A draft model drafts for several sequences together, and then not until these drafts are verified: a round. A
    sequence whose draft of the round is verified counts as one with a draft until the round ends.
    """

    def __init__(self, most: int) -> None:
        self._most = min(most, MOST_TOKENS)
        self._costs = PassCosts()
        self._turn = 0  # counts verifications
        self._decodes = 0  # that are left before the next verification
        self._round: set[Sequence] = set()

    def record_pass(self, batch: ForwardBatch, seconds: float) -> None:
        """Record the duration of a pass."""
        tokens = sum(len(entry.tokens) for entry in batch.entries)
        if batch.outputs == tokens:
            self._costs.record(tokens, seconds)

    def next_entry(self, running: list[Sequence]) -> BatchEntry | None:
        """The next verification, or None if the running sequences decode."""
        drafted = [found for each in running if (found := self._drafted(each))]
        ready = [found for found in drafted if self._is_ready(found, len(running))]
        begun = {sequence for sequence, draft, _ in ready if isinstance(draft, ModelDraft)}
        self._round = self._round | begun if begun else begun
        if not ready or (self._decodes > 0 and not self._round.union(found[0] for found in ready).issuperset(running)):
            self._decodes -= 1
            for size in {1 + len(tokens) for _, _, tokens in drafted} if not ready else ():
                self._costs.fade(size)
            return None
        sequence, _, tokens = min(ready, key=lambda found: found[0].verified_turn)
        self._turn += 1
        sequence.verified_turn = self._turn
        self._decodes = (1 + len(tokens)) // TOKENS_PER_DECODE
        return sequence.verification_entry(tokens)

    def wanted_drafts(self, running: list[Sequence], model: DraftSource) -> list[WantedDraft]:
        """The drafts that a draft model should compute now, or for which it should read what it lacks of the text.

        If the running sequences decode next, which would generate the first tokens of drafts, it only reads.
        """
        drafted = [found for each in running if (found := self._drafted(each))]
        ready = [found for found in drafted if self._is_ready(found, len(running))]
        if any(isinstance(draft, ModelDraft) for _, draft, _ in ready):
            return []
        others = {sequence for sequence, _, _ in drafted}
        wanted = [each for each in map(self._wanted, running) if each and each.sequence not in others]
        cost = (model.costs.of(len(wanted)) or 0.0) if wanted else 0.0
        paying = [each for each in wanted if self._pays(each.draft.acceptance, each.count, len(running), cost)]
        if wanted and not paying:
            model.costs.fade(len(wanted))
            for size in {1 + each.count for each in wanted}:
                self._costs.fade(size)
        paying = list(filter(model.can_draft, paying))
        if not all(self._costs.is_fresh(1 + each.count) for each in paying):
            del paying[1:]  # one verification measures the cost
        behind = [each for each in paying if not model.follows(each)]
        decodes_next = self._decodes > 0 and len(paying) - len(behind) + len(ready) < len(running)
        return behind if decodes_next else paying

    def _wanted(self, sequence: Sequence) -> WantedDraft | None:
        draft = model_draft(sequence)
        if draft is None or not sequence.is_last:
            return None
        count = min(draft.wanted, self._most - 1)
        return WantedDraft(sequence, draft, count) if 1 + count >= MIN_TOKENS else None

    def _drafted(self, sequence: Sequence) -> _Drafted | None:
        """A sequence with its draft and the tokens of it that can be verified."""
        for draft in sequence.drafts:
            if draft.is_proven and (rest := draft.rest) and sequence.is_last:
                tokens = rest[: min(self._most, sequence.tokens_left) - 1]
                return (sequence, draft, tokens) if 1 + len(tokens) >= MIN_TOKENS else None
        return None

    def _is_ready(self, found: _Drafted, running: int) -> bool:
        _, draft, tokens = found
        return self._pays(draft.acceptance, len(tokens), running)

    def _pays(self, acceptance: float, tokens: int, running: int, cost: float = 0.0) -> bool:
        """Whether a verification probably takes less time for each token than a decode of `running` sequences.

        `tokens`: of the draft, of which each takes `cost` seconds to draft.
        """
        decode, verification = self._costs.of(running), self._costs.of(1 + tokens)
        if decode is None:
            return False  # the next decode measures it
        gained = (1 + acceptance * tokens) * decode
        return verification is None or gained >= _MARGIN * ((1 + tokens) * verification + tokens * cost)


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
        recent = sequence.recent(entry.tokens[1 : index + 1])
        yield msgspec.structs.replace(
            query, position=position, generated=counts, repetitions=repetitions, recent=recent
        )


def confirmed_tokens(job: Job, entry: BatchEntry, found: list[list[Token]]) -> list[Token]:
    """The tokens that a verification generates: up to the first that ends the sample or differs from the draft."""
    tokens: list[Token] = []
    for (token,), drafted in zip(found, (*entry.tokens[1:], None), strict=True):
        tokens.append(token)
        if token.id != drafted or token.id in job.end_tokens:
            break
    return tokens
