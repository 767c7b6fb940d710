"""One sample's state in the engine, and the work that its samples share.

A sequence has tokens, and a slot that holds the computed ones; every pass lets those catch up. There is no other
notion of prefill and decode.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as TokenSequence
from dataclasses import dataclass, field

from afterword.engine.core.prefix_cache import PrefixQuery, Slot
from afterword.engine.core.token_counts import TokenCounts
from afterword.engine.protocol import Job, Token


@dataclass(slots=True, eq=False)
class JobState:
    """A job under way. Owned by the scheduler.

    `started`: its first tokens have been sampled, all from the same row of logits. `live` hold a slot; `queued`
    hold none: they are paused, or have their first token and had no slot yet. `query` is what may be found of its
    prompt, `times_passed_over` how many later jobs were preferred, `scores_sent` how many scores of the prompt's tokens
    were told. While it is `held` nothing is computed for it; while it is `reader_is_behind`, since its reader is
    behind, its sequences give way to anything that waits.
    """

    run: int
    job: Job
    query: PrefixQuery
    started: bool = False
    times_passed_over: int = 0
    held: bool = False
    reader_is_behind: bool = False
    scores_sent: int = 0
    live: list[Sequence] = field(default_factory=list)
    queued: deque[Sequence] = field(default_factory=deque)

    def unsent_scores(self, start: int, scores: TokenSequence[Token]) -> list[Token]:
        """Of the scores from place `start` on those that the job has not been told; they count as told."""
        fresh = list(scores[max(self.scores_sent - start, 0) :])
        self.scores_sent += len(fresh)
        return fresh


@dataclass(frozen=True, slots=True)
class Admission:
    """A job leaves the queue with what is known of its prompt. `complete`: there is nothing more to compute."""

    work: JobState
    cached: int
    scores: tuple[Token, ...]
    complete: bool


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one sample: the prompt's tokens, then the generated ones.

    `pieces`: of so many tokens the state is computed in pieces of many tokens, of the others token by token. `kept`:
    how many were generated before it got the slot that it has. `paused`: it ever lost one before its end; then it
    leaves unused slots to others up to the pass `resume_pass`.
    """

    work: JobState
    sample: int
    generated: list[int] = field(default_factory=list)
    slot: Slot | None = None
    pieces: int = 0
    kept: int = 0
    paused: bool = False
    resume_pass: int = 0
    token_counts: TokenCounts = field(default_factory=TokenCounts)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.work.job.prompt) + len(self.generated)

    @property
    def computed(self) -> int:
        """How many of them the slot holds."""
        return self.slot.length if self.slot else 0

    @property
    def index(self) -> int:
        """The place of its slot. It must have one."""
        assert self.slot is not None
        return self.slot.index

    @property
    def is_last(self) -> bool:
        """Whether one token is left to compute, after which the next one is drawn."""
        return self.computed + 1 == self.length

    @property
    def is_scored(self) -> bool:
        """Whether the job gets the scores of the prompt's tokens that the next forward pass computes.

        True while no token is generated. If a preempted sequence computes its prompt again after that, the job has all
        scores already. `engine.protocol.scored_positions` says which logits row scores which token.
        """
        return self.work.job.prompt_alternatives is not None and not self.generated

    @property
    def catching_up(self) -> bool:
        """Whether part of it is still to be computed in pieces."""
        return self.computed < self.pieces

    @property
    def generated_in_slot(self) -> int:
        """Tokens generated since it got its slot."""
        return len(self.generated) - self.kept

    def occupy(self, slot: Slot, in_pieces: bool) -> None:
        """Take a slot. `in_pieces`: if more than one token is missing, generated ones may be computed in pieces too."""
        self.slot, self.kept = slot, len(self.generated)
        self.pieces = self.length if in_pieces and self.length > slot.length + 1 else len(self.work.job.prompt)

    def append(self, token: int) -> None:
        """Take a sampled token."""
        self.generated.append(token)
        self.token_counts.add(token)

    def slice(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens from `start` up to `stop`."""
        prompt = self.work.job.prompt
        size = len(prompt)
        if start >= size:
            return tuple(self.generated[start - size : stop - size])
        return prompt[start : min(stop, size)] + tuple(self.generated[: max(0, stop - size)])
