"""Measures the cost of metrics: CPU time per token, forward pass, request and page of /metrics. Needs no server.

`python -m bench.metrics`. For comparison: a streamed token costs the server's process about 90 µs and the worker more
(docs/log.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from afterword.api.requests.request_recorder import RequestRecorder
from afterword.completion.run import Usage
from afterword.engine.core.forward_batch import SlotRules
from afterword.engine.core.prefix_cache import PrefixCache
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
    scheduler = Scheduler(PrefixCache(SlotRules(slots=16, grid=1, min_shared_tokens=16, can_truncate=True)), 256, 1)
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
        "request, server": _cost(lambda: _request(engine_metrics, metrics)) - _cost(_recorder),
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


def _recorder() -> RequestRecorder:
    recorder = RequestRecorder("req", "127.0.0.1")
    recorder.record_route("/v1/completions")
    recorder.record_model("model")
    recorder.record_usage(Usage(64, 128))
    recorder.record_status(200)
    return recorder


def _request(engine_metrics: EngineMetrics, metrics: Metrics) -> None:
    """Record everything that is counted for a request of one token."""
    recorder = _recorder()
    timer = JobTimer(engine_metrics, _JOB, recorder.started_at, time.monotonic)
    timer.record_step(Step())
    recorder.record_plan(n=1, prompts=1)
    recorder.record_compute_start()
    recorder.record_choice(0, "length")
    timer.record_step(_STEP)
    timer.record_end()
    metrics.record_request(recorder.outcome("POST", None))


def _page(engine_metrics: EngineMetrics, metrics: Metrics) -> bytes:
    return metrics.text(
        "ready", [EngineSnapshot("model", "ready", Load(16, 3, 5), _METER, engine_metrics, 65_536, 10**9)]
    )


if __name__ == "__main__":
    main()
