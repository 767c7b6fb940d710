"""One sample's state in the engine, and the work that its samples share.

A sequence has tokens, and a slot that holds the computed ones; every pass lets those catch up. There is no other
notion of prefill and decode.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from afterword.engine.core.slots import Slot, Wanted
from afterword.engine.protocol import Job


@dataclass(slots=True, eq=False)
class Work:
    """A job under way. Owned by the scheduler.

    `started`: its first tokens have been sampled, all from the same row of logits. `live` hold a slot; `queued`
    are samples that have their first token and no slot yet. `passed` counts the later jobs that were preferred.
    """

    run: int
    job: Job
    started: bool = False
    passed: int = 0
    live: list[Sequence] = field(default_factory=list)
    queued: deque[Sequence] = field(default_factory=deque)
    prompt: NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = np.array(self.job.prompt, np.int32)

    @property
    def wanted(self) -> Wanted:
        """What of this job may come from a slot. The last token may not where samples depend on its logits."""
        scores_only = self.job.max_tokens == 0 and self.job.prompt_alternatives is not None
        most = len(self.prompt) if scores_only else len(self.prompt) - 1
        return Wanted(self.job.namespace, self.prompt, most, self.job.prompt_alternatives)


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one sample: the prompt's tokens, then the generated ones."""

    work: Work
    sample: int
    generated: list[int] = field(default_factory=list)
    slot: Slot | None = None
    counts: Counter[int] = field(default_factory=Counter)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.work.job.prompt) + len(self.generated)

    @property
    def computed(self) -> int:
        """How many of them the slot holds."""
        return self.slot.length if self.slot else 0

    @property
    def catching_up(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.computed < len(self.work.job.prompt)

    def append(self, token: int) -> None:
        """Take a sampled token."""
        self.generated.append(token)
        self.counts[token] += 1

    def slice(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens from `start` up to `stop`."""
        prompt = self.work.job.prompt
        size = len(prompt)
        if start >= size:
            return tuple(self.generated[start - size : stop - size])
        return prompt[start : min(stop, size)] + tuple(self.generated[: max(0, stop - size)])
