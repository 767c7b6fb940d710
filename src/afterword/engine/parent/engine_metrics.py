"""Counters and histograms of one model's workers, for the `/metrics` endpoint.

The supervisor counts where steps arrive, for all clients and routes. A token that a restarted worker computes again is
not counted again. Recording one token takes less than a microsecond, because it happens for every token.
"""

from __future__ import annotations

from collections.abc import Callable

from afterword.engine.protocol import Job, PassStats, Step
from afterword.engine.store_stats import StoreStats
from afterword.observability.histogram import Histogram

LATENCY_BOUNDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
    *(10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0),
)
"""Bucket bounds in seconds for durations of requests: OpenAI's own clients wait 600 s."""

INTER_TOKEN_BOUNDS = (
    *(0.0005, 0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075),
    *(0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0),
)
"""Bucket bounds in seconds for the time between two tokens, and for forward passes."""

PASS_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0)
"""Bucket bounds for the number of tokens of a forward pass."""


class PassHistograms:
    """Histograms of the forward passes of one kind: tokens per pass and seconds per pass."""

    def __init__(self) -> None:
        self.tokens = Histogram(PASS_BOUNDS)
        self.seconds = Histogram(INTER_TOKEN_BOUNDS)


class EngineMetrics:
    """Owns the counters. Only the event loop's thread changes them.

    Histograms, in seconds:

    - `queued`: from the acceptance of a job to the start of its computation.
    - `prefill`: from there to the first token, or to the end of the job if it generates none.
    - `decode`: from the first token to the last.
    - `inter_token_seconds`: between two tokens of one sample. Those that arrive together have an equal share each.
    """

    def __init__(self) -> None:
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.drafted_tokens = 0
        self.accepted_tokens = 0
        self.restarts = 0
        self.store = StoreStats()  # of all workers so far
        self._store_before = StoreStats()  # of the workers before the present one
        self.queued = Histogram(LATENCY_BOUNDS)
        self.prefill = Histogram(LATENCY_BOUNDS)
        self.decode = Histogram(LATENCY_BOUNDS)
        self.inter_token_seconds = Histogram(INTER_TOKEN_BOUNDS)
        self.prompts = PassHistograms()
        self.generation = PassHistograms()

    def kinds(self) -> tuple[tuple[str, PassHistograms], ...]:
        """The histograms of each kind of pass, with the kind's name."""
        return ("prompt", self.prompts), ("generation", self.generation)

    def record_store(self, stats: StoreStats) -> None:
        """Record what the present worker's store of prefixes has done since the worker was started."""
        before = self._store_before
        self.store = StoreStats(
            hits=before.hits + stats.hits,
            hit_tokens=before.hit_tokens + stats.hit_tokens,
            written_bytes=before.written_bytes + stats.written_bytes,
            evictions=before.evictions + stats.evictions,
            failures=before.failures + stats.failures,
            bytes=stats.bytes,
        )

    def record_worker_start(self) -> None:
        """Note that a worker was started, whose counts begin at 0."""
        self._store_before = self.store

    def record_pass(self, pass_stats: PassStats) -> None:
        """Record a forward pass; `PassStats` without tokens means that none was made."""
        if pass_stats.tokens:
            passes = self.prompts if pass_stats.prompt else self.generation
            passes.tokens.add(pass_stats.tokens)
            passes.seconds.add(pass_stats.seconds)
            self.drafted_tokens += pass_stats.drafted_tokens
            self.accepted_tokens += pass_stats.accepted_tokens


class JobTimer:
    """Measures the phases of one job and adds them to the metrics.

    `clock` returns seconds; `since` is the time of that clock when the job was accepted.
    """

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
        self._last: list[float] = []  # for each sample, when its last token arrived

    def record_step(self, step: Step) -> None:
        """Record a step from which repeated tokens are removed."""
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
            self._last = [now] * self._samples  # the first tokens of all samples come from one logits row
            return
        last, gaps = self._last, engine_metrics.inter_token_seconds
        if len(step.sampled) == 1:  # most steps, and faster than below
            sample = step.sampled[0][0]
            gaps.add(now - last[sample])
            last[sample] = now
            return
        counts: dict[int, int] = {}
        for sample, _ in step.sampled:
            counts[sample] = counts.get(sample, 0) + 1
        for sample, tokens in counts.items():  # verified drafts and merged outputs are several tokens of a sample
            gaps.add((now - last[sample]) / tokens, tokens)
            last[sample] = now

    def record_end(self) -> None:
        """Record the end of the last sample; not called for a job that its consumer closed early."""
        if self._first is not None:
            self._engine_metrics.decode.add(self._latest - self._first)
        elif self._begun is not None:
            self._engine_metrics.prefill.add(self._clock() - self._begun)
