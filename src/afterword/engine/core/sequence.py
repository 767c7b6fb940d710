"""One sample's state in the engine, and the work that its samples share.

A sequence has tokens, and a slot that holds the computed ones; every pass lets those catch up. There is no other
notion of prefill and decode.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from afterword.engine.core.slots import Slot, Wanted
from afterword.engine.core.tally import Tally
from afterword.engine.protocol import Job


@dataclass(slots=True, eq=False)
class Work:
    """A job under way. Owned by the scheduler.

    `started`: its first tokens have been sampled, all from the same row of logits. `live` hold a slot; `queued`
    are samples that have their first token and no slot yet. `wanted` is what may be found of its prompt, `passed` how
    many later jobs were preferred. While it is `held` nothing is computed for it.
    """

    run: int
    job: Job
    wanted: Wanted
    started: bool = False
    passed: int = 0
    held: bool = False
    live: list[Sequence] = field(default_factory=list)
    queued: deque[Sequence] = field(default_factory=deque)


@dataclass(slots=True, eq=False)
class Sequence:
    """The state of one sample: the prompt's tokens, then the generated ones."""

    work: Work
    sample: int
    generated: list[int] = field(default_factory=list)
    slot: Slot | None = None
    tally: Tally = field(default_factory=Tally)

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
        self.tally.add(token)

    def slice(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens from `start` up to `stop`."""
        prompt = self.work.job.prompt
        size = len(prompt)
        if start >= size:
            return tuple(self.generated[start - size : stop - size])
        return prompt[start : min(stop, size)] + tuple(self.generated[: max(0, stop - size)])
