"""Collects what one forward pass has produced for one job, and makes a step of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from afterword.engine.core.sequence import Admission, Sequence
from afterword.engine.protocol import FinishReason, Step, Token
from afterword.engine.token_row import TokenRow


@dataclass(slots=True)
class StepBuilder:
    """The parts of a step, collected during one pass."""

    scored: list[Token] = field(default_factory=list)
    sampled: list[tuple[int, Token]] = field(default_factory=list)
    ended: list[tuple[int, FinishReason]] = field(default_factory=list)
    taken_back: int = 0

    def add_token(self, sequence: Sequence, token: Token, reason: FinishReason | None) -> None:
        """Add a sampled token, and those that the sample held before it; or hold it, if it may be taken back.

        A sample that would hold too much ends.
        """
        held = sequence.held
        tokens = [token] if held is None else held.release(everything=reason is not None)
        if held and held.is_full:
            tokens, reason = tokens + held.release(everything=True), "length"
        self.sampled.extend((sequence.sample, each) for each in tokens)
        if reason is not None:
            self.ended.append((sequence.sample, reason))

    def take_back(self, sequence: Sequence, count: int) -> None:
        """Take back the last tokens of a sample. If too many were taken back, the sample ends before them."""
        sequence.take_back(count)
        self.taken_back += count
        if sequence.held and sequence.held.is_exhausted:
            self.sampled.extend((sequence.sample, each) for each in sequence.held.release(everything=True))
            self.ended.append((sequence.sample, "length"))

    def step(self) -> Step:
        return Step(tuple(self.scored), tuple(self.sampled), tuple(self.ended), taken_back=self.taken_back)


def first_step(admission: Admission) -> Step:
    """The first step of a job: the cached scores of its prompt, before anything is computed for it."""
    job = admission.job_state.job
    scored = limit_alternatives(admission.scores, job.prompt_alternatives or 0)
    ended: list[tuple[int, FinishReason]] = (
        [(sample, "length") for sample in range(job.samples)] if admission.complete else []
    )
    return Step(scored=tuple(scored), ended=tuple(ended), cached=admission.cached)


def packed_step(step: Step, pack: Callable[[TokenRow], TokenRow]) -> Step:
    """The step with the rows of its tokens packed, as they are sent."""
    if not any(token.row for token in (*step.scored[:1], *(token for _, token in step.sampled[:1]))):
        return step
    return msgspec.structs.replace(
        step,
        scored=tuple(_packed_token(token, pack) for token in step.scored),
        sampled=tuple((sample, _packed_token(token, pack)) for sample, token in step.sampled),
    )


def _packed_token(token: Token, pack: Callable[[TokenRow], TokenRow]) -> Token:
    return msgspec.structs.replace(token, row=pack(token.row)) if token.row else token


def limit_alternatives(scores: list[Token] | tuple[Token, ...], alternatives: int) -> list[Token]:
    """The scores with at most `alternatives` alternatives each."""
    return [
        Token(score.id, score.logprob, score.top[:alternatives], score.rank) if len(score.top) > alternatives else score
        for score in scores
    ]
