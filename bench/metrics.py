"""Measures the cost of metrics: CPU time per token, forward pass, request and page of /metrics. Needs no server.

`python -m bench.metrics`. For comparison: a streamed token costs the server's process about 90 µs and the worker more
(docs/log.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from afterword.api.requests.request_context import RequestContext
from afterword.completion.run import Usage
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.messages import HEADER, PassDone, pack, unpack_for_server
from afterword.engine.parent.engine_metrics import EngineMetrics, JobTimer
from afterword.engine.protocol import Job, Load, PassStats, Sampling, Step, Token
from afterword.observability.metrics import EngineSnapshot, Metrics

_JOB = Job(tuple(range(64)), 1, 128, Sampling(), (), bytes(16))
_STEP = Step(sampled=((0, Token(1)),))
_METER = PassStats(False, 16, 0.0123, 12_000, 40_000)


class _Unmeasured(msgspec.Struct, frozen=True, array_like=True, tag="PassDone"):
    """A `PassDone` message without figures."""

    steps: dict[int, Step]
    load: Load


def main() -> None:
    """Print a line for each figure."""
    engine_metrics, metrics = EngineMetrics(), Metrics(["model"])
    timer = JobTimer(engine_metrics, _JOB, time.monotonic(), time.monotonic)
    timer.record_step(_STEP)
    scheduler = Scheduler(16, 256, 1, 16, True)
    message, bare = PassDone({}, Load(), _METER), _Unmeasured({}, Load())
    encode = msgspec.msgpack.Encoder().encode
    wire, bare_wire = pack(message)[HEADER.size :], encode(bare)
    reading = _cost(lambda: unpack_for_server(wire)) - _cost(lambda: unpack_for_server(bare_wire))
    costs = {
        "token, server": _cost(lambda: timer.record_step(_STEP)),
        "pass, server": _cost(lambda: engine_metrics.record_pass(_METER)) + reading,
        "pass, engine": _cost(lambda: PassStats(False, 16, 0.0123, *scheduler.slot_usage()))
        + _cost(lambda: encode(message))
        - _cost(lambda: encode(bare)),
        "request, server": _cost(lambda: _request(engine_metrics, metrics)) - _cost(_request_context),
        "page of /metrics": _cost(lambda: _page(engine_metrics, metrics), 100),
    }
    for name, seconds in costs.items():
        print(f"{name:<18} {seconds * 1e6:10.2f} µs")


def _cost(work: Callable[[], object], times: int = 50_000) -> float:
    """CPU seconds of one call: the minimum of ten rounds."""
    least = float("inf")
    for _ in range(10):
        start = time.process_time()
        for _ in range(times):
            work()
        least = min(least, (time.process_time() - start) / times)
    return least


def _request_context() -> RequestContext:
    request_context = RequestContext("req", "127.0.0.1", route="/v1/completions", model="model", status=200)
    request_context.record_usage(Usage(64, 128))
    request_context.finish[0] = "length"
    return request_context


def _request(engine_metrics: EngineMetrics, metrics: Metrics) -> None:
    """Record everything that is counted for a request of one token."""
    request_context = _request_context()
    timer = JobTimer(engine_metrics, _JOB, request_context.started_at, time.monotonic)
    timer.record_step(Step())
    request_context.n, request_context.choices = 1, 1
    request_context.mark_compute_started()
    request_context.first_token_at = request_context.compute_started_at
    timer.record_step(_STEP)
    timer.record_end()
    metrics.record_request(request_context.outcome("POST", None))


def _page(engine_metrics: EngineMetrics, metrics: Metrics) -> bytes:
    return metrics.text(
        "ready", [EngineSnapshot("model", "ready", Load(16, 3, 5), _METER, engine_metrics, 65_536, 10**9)]
    )


if __name__ == "__main__":
    main()
