"""What one model's engines have been asked and have brought, in numbers that only grow.

Counted where steps arrive, whoever asked and whatever for. A token that comes a second time, because an engine died and
its work was repeated, is not counted again. Adding a token costs less than a microsecond: it is done for each.
"""

from __future__ import annotations

from collections.abc import Callable

from afterword.engine.protocol import Job, PassStats, Step
from afterword.observability.histogram import Histogram

LATENCY_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
"""Bounds for what a request can take: the API's own clients wait 600 s."""

INTER_TOKEN_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
"""Bounds, in seconds, for the time from one token to the next, and for passes."""

PASS_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
"""Bounds for the tokens of a pass."""


class PassHistograms:
    """Passes of one kind: how many tokens each computed, and how long it took."""

    def __init__(self) -> None:
        self.tokens = Histogram(PASS_BOUNDS)
        self.seconds = Histogram(INTER_TOKEN_BOUNDS)


class EngineMetrics:
    """Owner of the numbers. One event loop adds to them.

    Of prompts, `queued`: seconds until computing began; `prefill`: from then to the first token, or to the end where
    none is generated; `decode`: from the first token to the last. `inter_token_seconds`: seconds between two tokens of
    a sample.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.restarts = 0
        self.queued = Histogram(LATENCY_BOUNDS)
        self.prefill = Histogram(LATENCY_BOUNDS)
        self.decode = Histogram(LATENCY_BOUNDS)
        self.inter_token_seconds = Histogram(INTER_TOKEN_BOUNDS)
        self.prompts = PassHistograms()
        self.generation = PassHistograms()

    def kinds(self) -> tuple[tuple[str, PassHistograms], ...]:
        """Passes of all kinds, by name."""
        return ("prompt", self.prompts), ("generation", self.generation)

    def record_pass(self, pass_stats: PassStats) -> None:
        """A pass was made, or none (see `PassStats`)."""
        if pass_stats.tokens:
            passes = self.prompts if pass_stats.prompt else self.generation
            passes.tokens.add(pass_stats.tokens)
            passes.seconds.add(pass_stats.seconds)


class JobTimer:
    """One job's way through its engines, told to a tally. `clock` gives seconds; `since`: when it was accepted."""

    __slots__ = ("_begun", "_clock", "_engine_metrics", "_first", "_last", "_latest", "_prompt", "_samples", "_since")

    def __init__(self, engine_metrics: EngineMetrics, job: Job, since: float, clock: Callable[[], float]) -> None:
        self._engine_metrics = engine_metrics
        self._clock = clock
        self._prompt = len(job.prompt)
        self._samples = job.samples
        self._since = since
        self._begun: float | None = None
        self._first: float | None = None
        self._latest = 0.0
        self._last: list[float] = []  # of each sample, when its last token came

    def record_step(self, step: Step) -> None:
        """A step has come, without what was brought before."""
        now, engine_metrics = self._clock(), self._engine_metrics
        if self._begun is None:
            self._begun = now
            engine_metrics.queued.add(now - self._since)
            engine_metrics.prompt_tokens += self._prompt
            engine_metrics.cached_tokens += step.cached
        if not step.sampled:
            return
        self._latest = now
        engine_metrics.generated_tokens += len(step.sampled)
        if self._first is None:
            self._first = now
            engine_metrics.prefill.add(now - self._begun)
            self._last = [now] * self._samples  # first tokens are all drawn from one row
            return
        last, gaps = self._last, engine_metrics.inter_token_seconds
        for sample, _ in step.sampled:
            gaps.add(now - last[sample])
            last[sample] = now

    def record_end(self) -> None:
        """Every sample has ended; not said of a job that was left."""
        if self._first is not None:
            self._engine_metrics.decode.add(self._latest - self._first)
        elif self._begun is not None:
            self._engine_metrics.prefill.add(self._clock() - self._begun)
