"""Counts requests, and writes all metrics in Prometheus' text format. It imports no web framework.

`Metrics` counts requests and how they ended, each when it is over. An engine's `EngineMetrics` counts computed tokens
and forward passes as they happen. The event loop owns both.

Label values come from closed sets only: names of served models, names of routes, error codes, ids of a bounded number
of API keys. They never contain text that a client sent. docs/metrics.md describes every metric.
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
from afterword.observability.key_counters import KeyCounters

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""The only format. OpenMetrics allows no colons in names: its library would write `vllm_…` where dashboards query
`vllm:…`."""

ENGINE_STATES = ("unloaded", "starting", "ready", "restarting", "failing", "closed")
SERVER_STATES = ("starting", "ready", "degraded", "draining")
FINISH_REASONS = ("stop", "length", "repetition", "abort", "error")
NO_ROUTE = "none"
METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE"})
_TOKEN_BOUNDS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5, 1e6)
_COUNT_BOUNDS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0)


class CompletionOutcome(msgspec.Struct, frozen=True):
    """How a completion ended that was given to an engine.

    `choices`: the number of requested choices; `reasons`: the finish reasons of those that ended. `begun` and `first`:
    seconds from the request to the first forward pass and to the first text of the response; None if there was none.
    `generated_tokens` counts all of them, whether or not they are in the text.
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
    """A finished request. `error`: its error code, or the error type where the code is null.

    `failed`: the server or load caused the error, not the client. `in_process`: a line of a batch, not an HTTP request.
    `seconds`: the time from the request's head to the end of the response. `key`: the id of a valid API key.
    """

    method: str
    route: str
    status: int
    error: str | None
    failed: bool
    in_process: bool
    seconds: float
    completion: CompletionOutcome | None
    key: str | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the request was a completion and all of its choices ended."""
        return (
            self.completion is not None
            and len(self.completion.reasons) == self.completion.choices
            and self.error is None
        )

    @property
    def incomplete_reason(self) -> str | None:
        """Why some choices did not end. None if all did, or if the request was rejected before any computation."""
        if self.completion is None or len(self.completion.reasons) == self.completion.choices:
            return None
        if not self.failed:
            return "abort"
        return None if self.completion.begun is None else "error"


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The state of one model at this moment.

    `token_capacity`: tokens that its slots can hold. `memory`: bytes of the worker's resident memory; None without a
    worker.
    """

    model: str
    state: str
    load: Load
    pass_stats: PassStats
    metrics: EngineMetrics
    token_capacity: int
    memory: int | None


@dataclass(frozen=True, slots=True)
class KeySnapshot:
    """The state of the key store.

    `seconds_since_sync`: seconds since the server last knew the keys to be those of the file. `skipped`: rows that are
    not valid keys. Both are None without a key store.
    """

    seconds_since_sync: float | None = None
    skipped: int | None = None


class _ModelCounters:
    """The counters of one model's completions."""

    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.first = Histogram(LATENCY_BOUNDS)
        self.whole = Histogram(LATENCY_BOUNDS)
        self.prompt_tokens = Histogram(_TOKEN_BOUNDS)
        self.generated_tokens = Histogram(_TOKEN_BOUNDS)
        self.n = Histogram(_COUNT_BOUNDS)


class Metrics:
    """Counts finished requests and writes the metrics page. It is used from one event loop.

    `rejected` counts connections that received an error before there was a request, by error code or status. The
    transport counts them. `prefix`: the beginning of all names, up to and including `:` or `_`. `max_keys`: how many
    API keys are counted apart; 0: keys are not counted.
    """

    def __init__(self, models: Iterable[str] = (), prefix: str = "afterword:", max_keys: int = 0) -> None:
        self.rejected: Counter[str] = Counter()
        self._prefix = prefix
        self._keys = KeyCounters(max_keys)
        self._http: Counter[tuple[str, str, str]] = Counter()
        self._errors: Counter[str] = Counter()
        self._requests = {model: _ModelCounters() for model in models}
        self._process = CollectorRegistry()
        ProcessCollector(registry=self._process)

    def add_model(self, model: str) -> None:
        """Count the completions of a further model."""
        self._requests.setdefault(model, _ModelCounters())

    def remove_model(self, model: str) -> None:
        """Forget a model. Later completions of it are not counted, so that the number of names is bounded."""
        self._requests.pop(model, None)

    def record_request(self, outcome: RequestOutcome) -> None:
        if not outcome.in_process:
            method = outcome.method if outcome.method in METHODS else "other"
            self._http[outcome.route, method, f"{outcome.status // 100}xx"] += 1
        if outcome.error is not None:
            self._errors[outcome.error] += 1
        if outcome.completion is not None:
            self._record_completion(outcome, outcome.completion)
        if outcome.key is not None:
            used = outcome.completion
            self._keys.add(outcome.key, outcome.status, *((used.prompt_tokens, used.generated_tokens) if used else ()))

    def _record_completion(self, outcome: RequestOutcome, completion: CompletionOutcome) -> None:
        requests = self._requests.get(completion.model)
        if requests is None:
            return
        for reason in completion.reasons:
            requests.reasons[reason] += 1
        if missing := outcome.incomplete_reason:
            requests.reasons[missing] += completion.choices - len(completion.reasons)
        if completion.first is not None and not outcome.in_process:
            requests.first.add(completion.first)
        if outcome.is_complete and not outcome.in_process:
            requests.whole.add(outcome.seconds)
        if outcome.is_complete:
            requests.prompt_tokens.add(completion.prompt_tokens)
            requests.generated_tokens.add(completion.generated_tokens)
            requests.n.add(completion.n)

    def text(self, server: str, engines: Sequence[EngineSnapshot], keys: KeySnapshot = KeySnapshot()) -> bytes:
        """The metrics page. `server`: the state of the server, one of `SERVER_STATES`."""
        registry = CollectorRegistry(auto_describe=False)
        families = (
            self._server_families(server),
            _key_families(self._prefix, keys),
            self._keys.families(self._prefix),
            self._request_families(),
        )
        registry.register(_StaticCollector([*chain(*families), *_engine_families(self._prefix, engines)]))
        return generate_latest(registry) + generate_latest(self._process)

    def _server_families(self, server: str) -> Iterator[Metric]:
        prefix = self._prefix
        http = CounterMetricFamily("http_requests", "Finished requests.", labels=("handler", "method", "status"))
        for labels, count in sorted(self._http.items()):
            http.add_metric(labels, count)
        yield http
        build = GaugeMetricFamily(f"{prefix}build_info", "1 for the running version.", labels=("version",))
        build.add_metric((__version__,), 1)
        yield build
        state = GaugeMetricFamily(f"{prefix}server_state", "1 for the state of the server.", labels=("state",))
        for each in SERVER_STATES:
            state.add_metric((each,), each == server)
        yield state
        yield _counted(f"{prefix}request_errors", "Errors sent to clients.", self._errors)
        yield _counted(f"{prefix}connections_refused", "Connections that received an error.", self.rejected)

    def _request_families(self) -> Iterator[Metric]:
        ended = CounterMetricFamily(
            f"{self._prefix}request_success", "Choices that have ended.", labels=("model_name", "finished_reason")
        )
        for model, requests in self._requests.items():
            for reason in FINISH_REASONS:
                ended.add_metric((model, reason), requests.reasons[reason])
        yield ended
        for name, (description, histogram) in _REQUEST_HISTOGRAMS.items():
            values = {(model,): histogram(requests) for model, requests in self._requests.items()}
            yield _histogram(f"{self._prefix}{name}", description, values)


class _StaticCollector:
    """A collector, in the form that the library requires, of metric families that exist already."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def _key_families(prefix: str, keys: KeySnapshot) -> Iterator[Metric]:
    for name, description, value in (
        (
            "keys_unread_seconds",
            "Seconds since the keys were last known to be those of the key file.",
            keys.seconds_since_sync,
        ),
        ("keys_skipped", "Rows of the key file that are not valid keys.", keys.skipped),
    ):
        family = GaugeMetricFamily(f"{prefix}{name}", description)
        if value is not None:
            family.add_metric((), value)
        yield family


def _engine_families(prefix: str, engines: Sequence[EngineSnapshot]) -> Iterator[Metric]:
    state = GaugeMetricFamily(
        f"{prefix}engine_state", "1 for the state of the model's engine.", labels=("model_name", "state")
    )
    for engine in engines:
        for each in ENGINE_STATES:
            state.add_metric((engine.model, each), each == engine.state)
    yield state
    for name, (description, gauge) in _GAUGES.items():
        family = GaugeMetricFamily(f"{prefix}{name}", description, labels=("model_name",))
        for engine in engines:
            if (value := gauge(engine)) is not None:
                family.add_metric((engine.model,), value)
        yield family
    for name, (description, count) in _COUNTERS.items():
        counter = CounterMetricFamily(f"{prefix}{name}", description, labels=("model_name",))
        for engine in engines:
            counter.add_metric((engine.model,), count(engine.metrics))
        yield counter
    for name, (description, histogram) in _HISTOGRAMS.items():
        yield _histogram(
            f"{prefix}{name}", description, {(engine.model,): histogram(engine.metrics) for engine in engines}
        )
    for name, (description, passes) in _PASS_HISTOGRAMS.items():
        kinds = {(engine.model, kind): passes(each) for engine in engines for kind, each in engine.metrics.kinds()}
        yield _histogram(f"{prefix}{name}", description, kinds, ("model_name", "kind"))


def _counted(name: str, description: str, counts: Counter[str]) -> CounterMetricFamily:
    counter = CounterMetricFamily(name, description, labels=("code",))
    for code, count in sorted(counts.items()):
        counter.add_metric((code,), count)
    return counter


def _histogram(
    name: str,
    description: str,
    histograms: Mapping[Any, Histogram],
    labels: tuple[str, ...] = ("model_name",),
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, description, labels=labels)
    for values, histogram in histograms.items():
        below = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*histogram.bounds, inf), histogram.counts, strict=True):
            below += count
            buckets.append((str(bound) if bound < inf else "+Inf", below))
        family.add_metric(values, buckets, histogram.sum)
    return family


def _fraction(engine: EngineSnapshot, tokens: int) -> float:
    return tokens / engine.token_capacity if engine.token_capacity else 0.0


_REQUEST_HISTOGRAMS: dict[str, tuple[str, Callable[[_ModelCounters], Histogram]]] = {
    "time_to_first_token_seconds": (
        "From a request's head to the first text of the response.",
        lambda each: each.first,
    ),
    "e2e_request_latency_seconds": ("From a request's head to the end of the response.", lambda each: each.whole),
    "request_prompt_tokens": ("prompt_tokens of complete responses.", lambda each: each.prompt_tokens),
    "request_generation_tokens": ("Tokens generated for complete responses.", lambda each: each.generated_tokens),
    "request_params_n": ("n of complete responses.", lambda each: each.n),
}
_GAUGES: dict[str, tuple[str, Callable[[EngineSnapshot], float | None]]] = {
    "num_requests_running": ("Samples that have a slot.", lambda each: each.load.running),
    "num_requests_waiting": ("Samples that wait for a slot.", lambda each: each.load.waiting),
    "kv_cache_usage_perc": (
        "Share of the KV cache that running samples use; 1 is all of it.",
        lambda each: _fraction(each, each.pass_stats.used_tokens),
    ),
    "kv_cache_kept_perc": (
        "Share of the KV cache that holds reusable prefixes.",
        lambda each: _fraction(each, each.pass_stats.cached_tokens),
    ),
    "prefix_store_bytes": ("Bytes in the folder of --cache-dir.", lambda each: each.metrics.store.bytes),
    "engine_resident_memory_bytes": ("Resident memory of the worker process.", lambda each: each.memory),
}
_COUNTERS: dict[str, tuple[str, Callable[[EngineMetrics], float]]] = {
    "prompt_tokens": ("Prompt tokens, cached or computed.", lambda engine_metrics: engine_metrics.prompt_tokens),
    "generation_tokens": ("Generated tokens.", lambda engine_metrics: engine_metrics.generated_tokens),
    "spec_decode_num_draft_tokens": (
        "Drafted tokens that were verified.",
        lambda engine_metrics: engine_metrics.drafted_tokens,
    ),
    "spec_decode_num_accepted_tokens": (
        "Drafted tokens that were generated.",
        lambda engine_metrics: engine_metrics.accepted_tokens,
    ),
    "prefix_cache_queries": (
        "Prompt tokens looked up in the prefix cache.",
        lambda engine_metrics: engine_metrics.prompt_tokens,
    ),
    "prefix_cache_hits": ("Prompt tokens found in the cache.", lambda engine_metrics: engine_metrics.cached_tokens),
    "prefix_store_hits": ("Prefixes read from --cache-dir.", lambda engine_metrics: engine_metrics.store.hits),
    "prefix_store_hit_tokens": ("Tokens of these prefixes.", lambda engine_metrics: engine_metrics.store.hit_tokens),
    "prefix_store_written_bytes": (
        "Bytes written to --cache-dir.",
        lambda engine_metrics: engine_metrics.store.written_bytes,
    ),
    "prefix_store_evictions": (
        "Files deleted so that --cache-size holds.",
        lambda engine_metrics: engine_metrics.store.evictions,
    ),
    "prefix_store_failures": (
        "Damaged files in --cache-dir, and reads and writes that the disk refused.",
        lambda engine_metrics: engine_metrics.store.failures,
    ),
    "engine_restarts": (
        "Workers that were started to replace one that died or hung.",
        lambda engine_metrics: engine_metrics.restarts,
    ),
}
_HISTOGRAMS: dict[str, tuple[str, Callable[[EngineMetrics], Histogram]]] = {
    "inter_token_latency_seconds": (
        "From one token of a sample to the next.",
        lambda engine_metrics: engine_metrics.inter_token_seconds,
    ),
    "request_queue_time_seconds": (
        "From a prompt's arrival to its start.",
        lambda engine_metrics: engine_metrics.queued,
    ),
    "request_prefill_time_seconds": (
        "From the start to the first token.",
        lambda engine_metrics: engine_metrics.prefill,
    ),
    "request_decode_time_seconds": ("From the first to the last token.", lambda engine_metrics: engine_metrics.decode),
}
_PASS_HISTOGRAMS: dict[str, tuple[str, Callable[[PassHistograms], Histogram]]] = {
    "engine_pass_tokens": ("Tokens of a forward pass.", lambda passes: passes.tokens),
    "engine_pass_seconds": ("Duration of a forward pass.", lambda passes: passes.seconds),
}
