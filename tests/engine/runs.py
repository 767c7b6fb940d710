"""Runs jobs on an engine loop and returns the tokens of each."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import msgspec

from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.protocol import Job, Step, Token
from engine.test_reproducible import numbers


@dataclass
class Runs:
    """Runs jobs to their end. `cached` lists the cached tokens of every job."""

    loop: EngineLoop
    distance: int = 1  # between two borders
    cached: list[int] = field(default_factory=list)
    _names: itertools.count[int] = field(default_factory=itertools.count)

    def run(self, *jobs: Job) -> list[list[list[Token]]]:
        """For each job the scores of its prompt, and the tokens of its samples."""
        names = [next(self._names) for _ in jobs]
        steps: dict[int, list[Step]] = {name: [] for name in names}
        for name, job in zip(names, jobs, strict=True):
            self.loop.start(name, job)
        while (passed := self.loop.step()) is not None:
            for name, step in passed.items():
                steps[name].append(step)
        self.loop.check()
        self.cached += [sum(step.cached for step in steps[name]) for name in names]
        found = [numbers(steps[name], job) for name, job in zip(names, jobs, strict=True)]
        return [[scored, *samples] for scored, samples, _ in found]

    def border(self, tokens: int) -> int:
        """The last border within the first tokens."""
        return tokens // self.distance * self.distance

    def cold(self, job: Job) -> list[list[Token]]:
        """The same without the prefix cache."""
        (result,) = self.run(msgspec.structs.replace(job, namespace=f"cold {next(self._names)}"))
        assert self.cached.pop() == 0
        return result
