"""What counting costs: CPU time for each token, pass and request, and for a page of /metrics. In process, no server.

`python -m bench.metrics`. A streamed token costs the server's process some 90 µs, the engine's more (docs/log.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec

from afterword.api.visit import Visit
from afterword.completion.run import Usage
from afterword.engine.core.scheduler import Scheduler
from afterword.engine.frames import HEADER, Pass, pack, unpack_from_engine
from afterword.engine.protocol import Job, Load, Meter, Sampling, Step, Token
from afterword.engine.tally import Course, Tally
from afterword.metrics import EngineFigures, Metrics

_JOB = Job(tuple(range(64)), 1, 128, Sampling(), (), bytes(16))
_STEP = Step(sampled=((0, Token(1)),))
_METER = Meter(False, 16, 0.0123, 12_000, 40_000)


class _Unmeasured(msgspec.Struct, frozen=True, array_like=True, tag="Pass"):
    """A pass as it would be told without figures."""

    steps: dict[int, Step]
    load: Load


def main() -> None:
    """Print a line a figure."""
    tally, metrics = Tally(), Metrics(["model"])
    course = Course(tally, _JOB, time.monotonic(), time.monotonic)
    course.took(_STEP)
    scheduler = Scheduler(16, 256, 1, 16, True)
    told, bare = Pass({}, Load(), _METER), _Unmeasured({}, Load())
    encode = msgspec.msgpack.Encoder().encode
    wire, bare_wire = pack(told)[HEADER.size :], encode(bare)
    reading = _cost(lambda: unpack_from_engine(wire)) - _cost(lambda: unpack_from_engine(bare_wire))
    costs = {
        "token, server": _cost(lambda: course.took(_STEP)),
        "pass, server": _cost(lambda: tally.passed(_METER)) + reading,
        "pass, engine": _cost(lambda: Meter(False, 16, 0.0123, *scheduler.filled()))
        + _cost(lambda: encode(told))
        - _cost(lambda: encode(bare)),
        "request, server": _cost(lambda: _request(tally, metrics)) - _cost(_visit),
        "page of /metrics": _cost(lambda: _page(tally, metrics), 100),
    }
    for name, seconds in costs.items():
        print(f"{name:<18} {seconds * 1e6:10.2f} µs")


def _cost(work: Callable[[], object], times: int = 50_000) -> float:
    """CPU seconds of one call: the least of ten rounds."""
    least = float("inf")
    for _ in range(10):
        start = time.process_time()
        for _ in range(times):
            work()
        least = min(least, (time.process_time() - start) / times)
    return least


def _visit() -> Visit:
    visit = Visit("req", "127.0.0.1", route="/v1/completions", model="model", status=200)
    visit.use(Usage(64, 128))
    visit.finish[0] = "length"
    return visit


def _request(tally: Tally, metrics: Metrics) -> None:
    """All that is counted of a request of one token."""
    visit = _visit()
    course = Course(tally, _JOB, visit.began, time.monotonic)
    course.took(Step())
    visit.n, visit.choices = 1, 1
    visit.begin()
    visit.first = visit.begun
    course.took(_STEP)
    course.ended()
    metrics.over(visit.ended("POST", None))


def _page(tally: Tally, metrics: Metrics) -> bytes:
    return metrics.text("ready", [EngineFigures("model", "ready", Load(16, 3, 5), _METER, tally, 65_536, 10**9)])


if __name__ == "__main__":
    main()
