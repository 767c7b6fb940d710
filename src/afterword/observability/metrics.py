"""What is counted of requests, and all figures in Prometheus' text format. Knows no web framework and no request.

Two owners count: `Metrics` here what requests were and how they ended, each when it is over; an engine's
`EngineMetrics` what was computed, as it comes. Labels take values from closed sets only: names of models that are
served, routes as we name them, codes of errors; never a word of a caller. What each figure means to an operator is in
docs/metrics.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import inf
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from afterword import __version__
from afterword.engine.parent.engine_metrics import LATENCY_BOUNDS, EngineMetrics, PassHistograms
from afterword.engine.protocol import Load, PassStats
from afterword.observability.histogram import Histogram

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""The only format: OpenMetrics allows no colons, so its library writes `vllm_…` where boards ask for `vllm:…`."""

ENGINE_STATES = ("unloaded", "starting", "ready", "restarting", "failing", "closed")
SERVER_STATES = ("starting", "ready", "degraded", "draining")
FINISH_REASONS = ("stop", "length", "abort", "error")
NO_ROUTE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
_TOKEN_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)
_COUNT_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class CompletionOutcome(msgspec.Struct, frozen=True):
    """What became of a completion that was handed to an engine.

    Of `choices` those in `reasons` were ended. `begun` and `first`, when anything of it was computed and when the first
    of the answer was there, are seconds after the request came. `generated_tokens` are in the text or not.
    """

    model: str
    n: int
    choices: int
    reasons: tuple[str, ...]
    begun: float | None
    first: float | None
    prompt_tokens: int
    generated_tokens: int
    cached_tokens: int


class RequestOutcome(msgspec.Struct, frozen=True):
    """A request that is over. `error`: the code that was told, or the type where an error has none.

    `failed`: the error was not the caller's. `in_process`: it was a row of a batch, which is no HTTP request and for
    which nobody waits. `seconds` it took, from its head to the end of its answer.
    """

    method: str
    route: str
    status: int
    error: str | None
    failed: bool
    in_process: bool
    seconds: float
    completion: CompletionOutcome | None

    @property
    def is_complete(self) -> bool:
        """Whether it was a completion and every choice was ended."""
        return (
            self.completion is not None
            and len(self.completion.reasons) == self.completion.choices
            and self.error is None
        )

    @property
    def incomplete_reason(self) -> str | None:
        """Why choices were not ended; None where the request was refused, which is no answer to count."""
        if self.completion is None or len(self.completion.reasons) == self.completion.choices:
            return None
        if not self.failed:
            return "abort"
        return None if self.completion.begun is None else "error"


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """One model at this moment. `room`: tokens that its slots can hold; `memory`: bytes, None without a process."""

    model: str
    state: str
    load: Load
    pass_stats: PassStats
    metrics: EngineMetrics
    room: int
    memory: int | None


@dataclass(frozen=True, slots=True)
class KeySnapshot:
    """The key file. `unread`: seconds since the keys were last known to be those of the file; None without a file."""

    unread: float | None = None
    skipped: int | None = None


class _Requests:
    """Completions of one model."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first = Histogram(LATENCY_BOUNDS)
        self.whole = Histogram(LATENCY_BOUNDS)
        self.prompt_tokens = Histogram(_TOKEN_BOUNDS)
        self.generated_tokens = Histogram(_TOKEN_BOUNDS)
        self.n = Histogram(_COUNT_BOUNDS)


class Metrics:
    """Owner of what is counted of requests. One event loop calls everything.

    `rejected`: who never came as far as a request, by the code or the status they were told; the door counts them.
    """

    def __init__(self, models: Iterable[str] = (), prefix: str = "afterword") -> None:
        self.rejected: Counter[str] = Counter()
        self._prefix = prefix
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._errors: Counter[str] = Counter()
        self._requests = {model: _Requests() for model in models}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def record_request(self, outcome: RequestOutcome) -> None:
        """A request is over."""
        if not outcome.in_process:
            method = outcome.method if outcome.method in METHODS else "other"
            self._http[outcome.route, method, f"{outcome.status // 100}xx"] += 1
        if outcome.error is not None:
            self._errors[outcome.error] += 1
        if outcome.completion is not None:
            self._answered(outcome, outcome.completion)

    def _answered(self, outcome: RequestOutcome, answer: CompletionOutcome) -> None:
        requests = self._requests.get(answer.model)
        if requests is None:
            requests = self._requests[answer.model] = _Requests()
        for reason in answer.reasons:
            requests.reasons[reason] += 1
        if loss := outcome.incomplete_reason:
            requests.reasons[loss] += answer.choices - len(answer.reasons)
        if answer.first is not None and not outcome.in_process:
            requests.first.add(answer.first)
        if outcome.is_complete and not outcome.in_process:
            requests.whole.add(outcome.seconds)
        if outcome.is_complete:
            requests.prompt_tokens.add(answer.prompt_tokens)
            requests.generated_tokens.add(answer.generated_tokens)
            requests.n.add(answer.n)

    def text(self, server: str, engines: Sequence[EngineSnapshot], keys: KeySnapshot = KeySnapshot()) -> bytes:
        """All figures. `server`: the state of the whole."""
        registry = CollectorRegistry(auto_describe=False)
        families = (self._of_server(server), _of_keys(self._prefix, keys), self._of_requests())
        registry.register(_StaticCollector([*chain(*families), *_of_engines(self._prefix, engines)]))
        return generate_latest(registry) + generate_latest(self._process)

    def _of_server(self, server: str) -> Iterator[Metric]:
        prefix = self._prefix
        http = CounterMetricFamily("http_requests", "Requests that are over.", labels=("handler", "method", "status"))
        for labels, count in sorted(self._http.items()):
            http.add_metric(labels, count)
        yield http
        build = GaugeMetricFamily(f"{prefix}:build_info", "1, for the version that runs.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        state = GaugeMetricFamily(f"{prefix}:server_state", "1 for the state of the server.", labels=("state",))
        for each in SERVER_STATES:
            state.add_metric((each,), each == server)
        yield state
        yield _counted(f"{prefix}:request_errors", "Errors that callers were told.", self._errors)
        yield _counted(f"{prefix}:connections_refused", "Connections that were told an error.", self.rejected)

    def _of_requests(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            f"{self._prefix}:request_success", "Choices that have ended.", labels=("model_name", "finished_reason")
        )
        for model, requests in self._requests.items():
            for reason in FINISH_REASONS:
                ended.add_metric((model, reason), requests.reasons[reason])
        yield ended
        for name, (about, histogram) in _OF_REQUESTS.items():
            values = {(model,): histogram(requests) for model, requests in self._requests.items()}
            yield _histogram(f"{self._prefix}:{name}", about, values)


class _StaticCollector:
    """Families that are made already, as the library wants to collect them."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _of_keys(prefix: str, keys: KeySnapshot) -> Iterator[Metric]:
    for name, about, value in (
        ("keys_unread_seconds", "Since the keys were last known to be those of the key file.", keys.unread),
        ("keys_skipped", "Rows of the key file that are no keys.", keys.skipped),
    ):
        family = GaugeMetricFamily(f"{prefix}:{name}", about)
        if value is not None:
            family.add_metric((), value)
        yield family


def _of_engines(prefix: str, engines: Sequence[EngineSnapshot]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        f"{prefix}:engine_state", "1 for the state of the model's engine.", labels=("model_name", "state")
    )
    for engine in engines:
        for each in ENGINE_STATES:
            state.add_metric((engine.model, each), each == engine.state)
    yield state
    for name, (about, gauge) in _GAUGES.items():
        family = GaugeMetricFamily(f"{prefix}:{name}", about, labels=("model_name",))
        for engine in engines:
            if (value := gauge(engine)) is not None:
                family.add_metric((engine.model,), value)
        yield family
    for name, (about, count) in _COUNTERS.items():
        counter = CounterMetricFamily(f"{prefix}:{name}", about, labels=("model_name",))
        for engine in engines:
            counter.add_metric((engine.model,), count(engine.metrics))
        yield counter
    for name, (about, histogram) in _HISTOGRAMS.items():
        yield _histogram(f"{prefix}:{name}", about, {(engine.model,): histogram(engine.metrics) for engine in engines})
    for name, (about, passes) in _OF_PASSES.items():
        kinds = {(engine.model, kind): passes(each) for engine in engines for kind, each in engine.metrics.kinds()}
        yield _histogram(f"{prefix}:{name}", about, kinds, ("model_name", "kind"))


def _counted(name: str, about: str, counts: Counter[str]) -> CounterMetricFamily:
    counter = CounterMetricFamily(name, about, labels=("code",))
    for code, count in sorted(counts.items()):
        counter.add_metric((code,), count)
    return counter


def _histogram(
    name: str,
    about: str,
    histograms: Mapping[Any, Histogram],
    labels: tuple[str, ...] = ("model_name",),
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, about, labels=labels)
    for values, histogram in histograms.items():
        below = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*histogram.bounds, inf), histogram.counts, strict=True):
            below += count
            buckets.append((str(bound) if bound < inf else "+Inf", below))
        family.add_metric(values, buckets, histogram.sum)
    return family


def _fraction(engine: EngineSnapshot, tokens: int) -> float:
    return tokens / engine.room if engine.room else 0.0


_OF_REQUESTS: dict[str, tuple[str, Callable[[_Requests], Histogram]]] = {
    "time_to_first_token_seconds": ("From a request's head to the first of its answer.", lambda each: each.first),
    "e2e_request_latency_seconds": ("From a request's head to the end of its answer.", lambda each: each.whole),
    "request_prompt_tokens": ("prompt_tokens of whole answers.", lambda each: each.prompt_tokens),
    "request_generation_tokens": ("Tokens generated for whole answers.", lambda each: each.generated_tokens),
    "request_params_n": ("n of whole answers.", lambda each: each.n),
}
_GAUGES: dict[str, tuple[str, Callable[[EngineSnapshot], float | None]]] = {
    "num_requests_running": ("Samples that are computed.", lambda each: each.load.running),
    "num_requests_waiting": ("Samples that wait.", lambda each: each.load.waiting),
    "kv_cache_usage_perc": (
        "Share of the room that samples fill; 1 is all.",
        lambda each: _fraction(each, each.pass_stats.used_tokens),
    ),
    "kv_cache_kept_perc": (
        "Share of the room that is kept for later.",
        lambda each: _fraction(each, each.pass_stats.cached_tokens),
    ),
    "engine_resident_memory_bytes": ("Memory of the engine's process.", lambda each: each.memory),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineMetrics], float]]] = {
    "prompt_tokens": ("Tokens of prompts, found or computed.", lambda engine_metrics: engine_metrics.prompt_tokens),
    "generation_tokens": ("Tokens that were generated.", lambda engine_metrics: engine_metrics.generated_tokens),
    "prefix_cache_queries": (
        "Tokens of prompts that were looked for.",
        lambda engine_metrics: engine_metrics.prompt_tokens,
    ),
    "prefix_cache_hits": ("Tokens of prompts that were found.", lambda engine_metrics: engine_metrics.cached_tokens),
    "engine_restarts": (
        "Engines that were started after one had died.",
        lambda engine_metrics: engine_metrics.restarts,
    ),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[EngineMetrics], Histogram]]] = {
    "inter_token_latency_seconds": (
        "From one token of a sample to the next.",
        lambda engine_metrics: engine_metrics.inter_token_seconds,
    ),
    "request_queue_time_seconds": ("Until a prompt's turn came.", lambda engine_metrics: engine_metrics.queued),
    "request_prefill_time_seconds": ("From then to its first token.", lambda engine_metrics: engine_metrics.prefill),
    "request_decode_time_seconds": ("From then to its last token.", lambda engine_metrics: engine_metrics.decode),
}
_OF_PASSES: dict[str, tuple[str, Callable[[PassHistograms], Histogram]]] = {
    "engine_pass_tokens": ("Tokens of a forward pass.", lambda passes: passes.tokens),
    "engine_pass_seconds": ("What a forward pass took.", lambda passes: passes.seconds),
}
