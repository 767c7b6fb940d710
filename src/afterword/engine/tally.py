"""What one model's engines have been asked and have brought, in numbers that only grow.

Counted where steps arrive, whoever asked and whatever for. A token that comes a second time, because an engine died and
its work was repeated, is not counted again. Adding a token costs less than a microsecond: it is done for each.
"""

from __future__ import annotations

from collections.abc import Callable

from afterword.engine.protocol import Job, Meter, Step
from afterword.histogram import Histogram

SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
"""Bounds for what a request can take: the API's own clients wait 600 s."""

GAPS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
"""Bounds, in seconds, for the time from one token to the next, and for passes."""

PASS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
"""Bounds for the tokens of a pass."""


class Passes:
    """Passes of one kind: how many tokens each computed, and how long it took."""

    def __init__(self) -> None:
        self.tokens = Histogram(PASS)
        self.seconds = Histogram(GAPS)


class Tally:
    """Owner of the numbers. One event loop adds to them.

    Of prompts, `queued`: seconds until computing began; `prefill`: from then to the first token, or to the end where
    none is generated; `decode`: from the first token to the last. `gaps`: seconds between two tokens of a sample.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.restarts = 0
        self.queued = Histogram(SECONDS)
        self.prefill = Histogram(SECONDS)
        self.decode = Histogram(SECONDS)
        self.gaps = Histogram(GAPS)
        self.prompts = Passes()
        self.generation = Passes()

    def kinds(self) -> tuple[tuple[str, Passes], ...]:
        """Passes of all kinds, by name."""
        return ("prompt", self.prompts), ("generation", self.generation)

    def passed(self, meter: Meter) -> None:
        """A pass was made, or none (see `Meter`)."""
        if meter.tokens:
            passes = self.prompts if meter.prompt else self.generation
            passes.tokens.add(meter.tokens)
            passes.seconds.add(meter.seconds)


class Course:
    """One job's way through its engines, told to a tally. `clock` gives seconds; `since`: when it was accepted."""

    __slots__ = ("_begun", "_clock", "_first", "_last", "_latest", "_prompt", "_samples", "_since", "_tally")

    def __init__(self, tally: Tally, job: Job, since: float, clock: Callable[[], float]) -> None:
        self._tally = tally
        self._clock = clock
        self._prompt = len(job.prompt)
        self._samples = job.samples
        self._since = since
        self._begun: float | None = None
        self._first: float | None = None
        self._latest = 0.0
        self._last: list[float] = []  # of each sample, when its last token came

    def took(self, step: Step) -> None:
        """A step has come, without what was brought before."""
        now, tally = self._clock(), self._tally
        if self._begun is None:
            self._begun = now
            tally.queued.add(now - self._since)
            tally.prompt_tokens += self._prompt
            tally.cached_tokens += step.cached
        if not step.sampled:
            return
        self._latest = now
        tally.generated_tokens += len(step.sampled)
        if self._first is None:
            self._first = now
            tally.prefill.add(now - self._begun)
            self._last = [now] * self._samples  # first tokens are all drawn from one row
            return
        last, gaps = self._last, tally.gaps
        for sample, _ in step.sampled:
            gaps.add(now - last[sample])
            last[sample] = now

    def ended(self) -> None:
        """Every sample has ended; not said of a job that was left."""
        if self._first is not None:
            self._tally.decode.add(self._latest - self._first)
        elif self._begun is not None:
            self._tally.prefill.add(self._clock() - self._begun)
