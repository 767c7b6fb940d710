"""The engine's heartbeat: schedule, run, postprocess. Knows any runner, and no library and no process."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from afterword.engine.core import sampler
from afterword.engine.core.batch import Logits, Row, Runner
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.core.sequence import Sequence
from afterword.engine.protocol import End, Job, Load, Step, Token


@dataclass(slots=True)
class _Draft:
    """A step while it is being put together."""

    scored: list[Token] = field(default_factory=list)
    sampled: list[tuple[int, Token]] = field(default_factory=list)
    ended: list[tuple[int, End]] = field(default_factory=list)

    def step(self) -> Step:
        return Step(tuple(self.scored), tuple(self.sampled), tuple(self.ended))


class Loop:
    """Owner of the scheduler and the runner. One thread calls everything."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._scheduler = Scheduler(runner.slots, runner.chunk, runner.rewinds)

    def start(self, run: int, job: Job) -> None:
        """Take a job; its steps come out of `step` under the name `run`."""
        self._scheduler.add(run, job)

    def drop(self, run: int, sample: int) -> None:
        """End one sample."""
        self._scheduler.drop(run, sample)

    def close(self, run: int) -> None:
        """End a job."""
        self._scheduler.close(run)

    def load(self) -> Load:
        """How busy the engine is."""
        return self._scheduler.load()

    def step(self) -> dict[int, Step] | None:
        """One forward pass. Returns what it brought each job (perhaps nothing), or None when idle."""
        batch = self._scheduler.schedule()
        if batch is None:
            return None
        logits = self._runner.run(batch)
        drafts: defaultdict[int, _Draft] = defaultdict(_Draft)
        first = 0
        for row in batch.rows:
            sequence = self._scheduler.at(row.slot)
            self._postprocess(row, logits[first : first + row.outputs], drafts[sequence.work.run])
            first += row.outputs
        return {run: draft.step() for run, draft in drafts.items()}

    def _postprocess(self, row: Row, logits: Logits, draft: _Draft) -> None:
        sequence = self._scheduler.computed(row)
        job = sequence.work.job
        if job.prompt_alternatives is not None and not sequence.generated:
            draft.scored.extend(_score(row, logits, job))
        if sequence.computed < sequence.length or not len(logits):
            return
        if sequence.generated:
            if self._sample(sequence, logits[-1], draft):
                self._scheduler.end(sequence)
        else:
            self._begin(sequence, logits[-1], draft)

    def _begin(self, first: Sequence, logits: Logits, draft: _Draft) -> None:
        """The prompt is complete: every sample draws its first token from the same row."""
        work = first.work
        samples = [Sequence(work, index) for index in range(work.job.samples)]
        if work.job.max_tokens == 0:
            draft.ended.extend((s.sample, "length") for s in samples)
            samples = []
        self._scheduler.begin(first, [s for s in samples if not self._sample(s, logits, draft)])

    def _sample(self, sequence: Sequence, logits: Logits, draft: _Draft) -> bool:
        """Draw a sample's next token; returns whether that ended it."""
        job = sequence.work.job
        draw = sampler.uniform(job.key, sequence.sample, len(sequence.generated))
        banned = job.ends if len(sequence.generated) < job.min_tokens else ()
        row = sampler.adjusted(logits, job.sampling, job.prompt, sequence.counts, banned)
        token = sampler.choose(row, job.sampling, draw)
        draft.sampled.append((sequence.sample, sampler.report(logits, token, job.alternatives)))
        sequence.append(token)
        if token in job.ends:
            draft.ended.append((sequence.sample, "stop"))
        elif len(sequence.generated) == job.max_tokens:
            draft.ended.append((sequence.sample, "length"))
        else:
            return False
        return True


def _score(row: Row, logits: Logits, job: Job) -> list[Token]:
    """Tokens of the prompt that this row's logits predict: each row speaks of the token after it."""
    start = row.position + 1
    following = job.prompt[start : start + len(row.tokens)]
    return [sampler.report_prompt(logits[i], token, job.prompt_alternatives) for i, token in enumerate(following)]
