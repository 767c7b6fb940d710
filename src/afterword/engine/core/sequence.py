"""The state of one sample in the scheduler, and the state of the job that its samples share.

A sequence has tokens and, while it runs, a slot that holds the computed ones. Each pass computes more of its tokens.
Prefill and decode are not separate states of a sequence.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field

from afterword.engine.core.banned_text import HeldTokens
from afterword.engine.core.forward_batch import BatchEntry
from afterword.engine.core.matcher import Matcher, first_tokens
from afterword.engine.core.repetitions import EarlierRepetitions, Repetitions
from afterword.engine.core.sampler import SampleTokens
from afterword.engine.core.sampler_chain import first_limit
from afterword.engine.core.slot import PrefixQuery, Slot
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.draft import Draft, ModelDraft
from afterword.engine.protocol import Job, Token


@dataclass(slots=True, eq=False)
class JobState:
    """An accepted job. Owned by the scheduler.

    `query`: the request to the prefix cache for its prompt. `started`: its first tokens are sampled, all from the same
    logits row. `times_passed_over`: how often the scheduler preferred a later job. `suspended`: the scheduler computes
    nothing for the job. `reader_is_behind`: the client reads too slowly, so the job's sequences are preempted before
    all others. `scores_sent`: how many scores of prompt tokens were returned. `live`: sequences that have a slot.
    `queued`: sequences that have none, because they were preempted or because there was no free slot after their first
    token. `limits`: by sample, see `core.sampler_chain.ChainQuery`.
    """

    job_id: int
    job: Job
    query: PrefixQuery
    started: bool = False
    times_passed_over: int = 0
    suspended: bool = False
    reader_is_behind: bool = False
    scores_sent: int = 0
    live: list[Sequence] = field(default_factory=list)
    queued: deque[Sequence] = field(default_factory=deque)
    limits: dict[int, list[float]] = field(default_factory=dict)

    def limits_of(self, samples: TokenSequence[int]) -> list[list[float]]:
        """What Mirostat or adaptive-p remembers of each sample; nothing if the job does not use them."""
        chain = self.job.sampling.chain
        first = first_limit(chain) if chain else None
        return [] if first is None else [self.limits.setdefault(sample, [first]) for sample in samples]

    @property
    def holds_prompt(self) -> bool:
        """Whether the slot of a running sample holds all tokens of the prompt."""
        return any(sequence.computed >= len(self.job.prompt) for sequence in self.live)

    @property
    def finished_prompt(self) -> int:
        """How many of the prompt's first tokens need no scores any more."""
        return len(self.job.prompt) if self.started else self.scores_sent

    def unsent_scores(self, start: int, scores: TokenSequence[Token]) -> list[Token]:
        """The scores, of which the first has index `start`, that were not returned before. Marks them as sent."""
        unsent = list(scores[max(self.scores_sent - start, 0) :])
        self.scores_sent += len(unsent)
        return unsent


@dataclass(frozen=True, slots=True)
class Admission:
    """A job that leaves the queue, with the cached part of its prompt. `complete`: there is nothing more to compute."""

    job_state: JobState
    cached: int
    scores: tuple[Token, ...]
    complete: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one sample: the prompt's tokens, then the generated ones.

    `prefill_length`: the first tokens, up to this many, are computed in chunks; later tokens are computed one by one.
    `sampled_before_slot`: number of tokens sampled before the sequence got its present slot. `paused`: the sequence
    was preempted at least once. It then leaves free slots to others until the pass number `resume_pass`. `drafts`: the
    preferred one first. `verified_turn`: see `core.verification`. `repetitions`: those of its text, once DRY needed
    them. `matcher`: the sample's place in the job's grammar. `held`: for jobs with banned phrases. `earlier`: the
    repetitions before the tokens in `held`; such a job has `repetitions` from the first token on.
    """

    job_state: JobState
    sample: int
    generated: list[int] = field(default_factory=list)
    slot: Slot | None = None
    prefill_length: int = 0
    sampled_before_slot: int = 0
    paused: bool = False
    resume_pass: int = 0
    token_counts: TokenCounts = field(default_factory=TokenCounts)
    drafts: tuple[Draft | ModelDraft, ...] = ()
    verified_turn: int = 0
    repetitions: Repetitions | None = None
    matcher: Matcher | None = None
    held: HeldTokens | None = None
    earlier: EarlierRepetitions = field(default_factory=EarlierRepetitions)

    @property
    def length(self) -> int:
        """Number of tokens, prompt and generated."""
        return len(self.job_state.job.prompt) + len(self.generated)

    @property
    def computed(self) -> int:
        """Number of tokens that the slot holds; 0 without a slot."""
        return self.slot.length if self.slot else 0

    @property
    def index(self) -> int:
        """The index of its slot. The sequence must have one."""
        assert self.slot is not None
        return self.slot.index

    @property
    def is_last(self) -> bool:
        """Whether one token is left to compute, after which the next one is sampled."""
        return self.computed + 1 == self.length

    @property
    def is_scored(self) -> bool:
        """Whether the job gets the scores of the prompt's tokens that the next forward pass computes.

        True until the samples start. If a sequence computes its prompt again after that, the job has all scores
        already. `engine.protocol.scored_positions` says which logits row scores which token.
        """
        return self.job_state.job.prompt_alternatives is not None and not self.job_state.started

    @property
    def needs_prefill(self) -> bool:
        """Whether a part of it is still to be computed in chunks."""
        return self.computed < self.prefill_length

    @property
    def sampled(self) -> int:
        """Number of tokens that were generated, those that were taken back included."""
        return len(self.generated) + (self.held.taken_back if self.held else 0)

    @property
    def sampled_in_slot(self) -> int:
        """Number of tokens sampled since the sequence got its slot."""
        return self.sampled - self.sampled_before_slot

    def assign_slot(self, slot: Slot, chunk_generated: bool) -> None:
        """Set the slot. `chunk_generated`: if several tokens are missing, generated ones may be computed in chunks."""
        self.slot, self.sampled_before_slot = slot, self.sampled
        in_chunks = chunk_generated and self.length > slot.length + 1
        self.prefill_length = self.length if in_chunks else len(self.job_state.job.prompt)

    def take_back(self, count: int) -> None:
        """Remove the last generated tokens."""
        for _ in range(count):
            self.token_counts.remove(self.generated.pop())
        if self.repetitions is not None:
            start, self.repetitions = self.earlier.take(len(self.generated))
            for place in range(start, len(self.generated)):
                self._add_repetition(self.repetitions, place)
        self.prefill_length = min(self.prefill_length, max(self.length - 1, len(self.job_state.job.prompt)))

    @property
    def tokens_left(self) -> int:
        """The most tokens that it can still generate."""
        return self.job_state.job.max_tokens - len(self.generated)

    def decode_entry(self) -> BatchEntry:
        """The entry of a pass that computes the next token."""
        return BatchEntry(self.index, self.computed, self.slice(self.computed, self.computed + 1), int(self.is_last))

    def verification_entry(self, draft: tuple[int, ...]) -> BatchEntry:
        """The entry of a pass that computes the last token and a draft of those after it."""
        tokens = self.slice(self.computed, self.length) + draft
        return BatchEntry(self.index, self.computed, tokens, len(tokens))

    def known_repetitions(self) -> Repetitions | None:
        """The repetitions of its text for DRY; None if the job does not use it."""
        chain = self.job_state.job.sampling.chain
        if self.repetitions is None and chain and chain.dry:
            self.repetitions = Repetitions(chain.dry, self.slice(0, self.length))
        return self.repetitions

    def next_token(self, samples: TokenSequence[int]) -> SampleTokens:
        """The query for the next token of samples that share its text."""
        state = self.job_state
        repetitions, limits = self.known_repetitions(), state.limits_of(samples)
        position = len(self.generated)
        excluded = self.held.banned(position) if self.held else ()
        mask = first_tokens(state.job, excluded) if state.job.first and not position else None
        known = (repetitions, limits, mask, excluded, self.recent())
        return SampleTokens(state.job, samples, position, self.token_counts, *known)

    def recent(self, drafted: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The last tokens, which penalties with a window count; empty without a window, or if it holds all tokens.

        `drafted`: tokens that follow the text.
        """
        chain = self.job_state.job.sampling.chain
        count = chain.last_n if chain else None
        if count is None or not 0 < count < self.length + len(drafted):
            return ()
        return (self.slice(max(0, self.length - count), self.length) + drafted)[-count:]

    def append(self, token: int) -> None:
        """Append a sampled token."""
        self.generated.append(token)
        self.token_counts.add(token)
        if self.repetitions is not None:
            self._add_repetition(self.repetitions, len(self.generated) - 1)
        for draft in self.drafts:
            draft.append(token)

    def _add_repetition(self, repetitions: Repetitions, place: int) -> None:
        """Add the generated token at a place to the repetitions of the text before it."""
        if self.held is not None:
            self.earlier.keep(place, self.held.first, repetitions)
        repetitions.add(self.generated[place])

    def slice(self, start: int, stop: int) -> tuple[int, ...]:
        """The tokens from index `start` up to `stop`."""
        prompt = self.job_state.job.prompt
        size = len(prompt)
        if start >= size:
            return tuple(self.generated[start - size : stop - size])
        return prompt[start : min(stop, size)] + tuple(self.generated[: max(0, stop - size)])
