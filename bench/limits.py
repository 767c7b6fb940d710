"""Measures the machine's limits, which bound the speed of all servers.

Generating one token reads all weights once, so read bandwidth bounds one stream. Prefill multiplies matrices, so the
peak of matrix products bounds it. The speed of the client of `bench` bounds all measurements over HTTP.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import platform
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from bench.client import Client

FLAGS = ("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "amx_int8",
         "amx_bf16", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
"""The CPU features that select llama.cpp's kernels on x86 and ARM."""
PIECE = 4 * 2**20  # bytes
Json = dict[str, Any]


def machine() -> Json:
    """A description of this machine, without its name."""
    facts = _cpu_facts()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cpu": facts.get("model name", platform.processor() or "unknown"),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def load() -> float:
    """The number of cores that other programs use now. All servers must be idle during this call."""
    return float(psutil.cpu_percent(interval=0.5)) / 100 * (os.cpu_count() or 1)


def bandwidth(workers: int, mebibytes: int, repeats: int = 5) -> float:
    """Bytes per second that `workers` threads read from an array that is larger than the caches.

    The faster of two orders: each thread reads one contiguous part, or the threads read neighbouring pieces.
    """
    numbers = np.ones(mebibytes * 2**20 // 4, np.float32)
    pieces = numbers.reshape(-1, PIECE // 4)
    apart = [list(part) for part in np.array_split(pieces, workers)]
    beside = [list(pieces[worker::workers]) for worker in range(workers)]
    with ThreadPoolExecutor(workers) as pool:  # numpy releases the GIL
        times = [_shortest(partial(_read, pool, shares), repeats) for shares in (apart, beside)]
    return numbers.nbytes / min(times)


def bandwidth_now() -> float:
    """Bytes per second that all cores read now. Takes less than a second."""
    return bandwidth(os.cpu_count() or 1, mebibytes=256, repeats=3)


def _read(pool: ThreadPoolExecutor, shares: list[list[np.ndarray]]) -> None:
    list(pool.map(lambda share: [piece.max() for piece in share], shares))


def matrix_peak(size: int, repeats: int = 5) -> float:
    """Floating-point operations per second of a product of float32 matrices, on all cores that numpy uses."""
    left = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    return 2 * size**3 / _shortest(lambda: left @ left, repeats)


async def client_peak(requests: int, events: int) -> tuple[float, float]:
    """Requests and streamed events per second of the client, with a server that sends prepared responses."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve_canned, args=(theirs, events), daemon=True)
    server.start()
    try:
        client = Client(f"http://127.0.0.1:{await asyncio.to_thread(ours.recv)}")
        body = {"prompt": list(range(1000, 1016))}
        streams = 16
        started = perf_counter()
        await asyncio.gather(*(client.ask("/stream", body) for _ in range(streams)))
        streamed = streams * events / (perf_counter() - started)
        started = perf_counter()
        for _ in range(requests // 32):
            await asyncio.gather(*(client.ask("/once", body) for _ in range(32)))
        asked = requests // 32 * 32 / (perf_counter() - started)
        await client.close()
        return asked, streamed
    finally:
        server.kill()


async def measure(quick: bool = False) -> Json:
    """Measure all limits."""
    cores = os.cpu_count() or 1
    mebibytes, size, requests, events = (16, 256, 64, 50) if quick else (1024, 2048, 3200, 2000)
    asked, streamed = await client_peak(requests, events)
    return {
        "read_bytes_per_s": {
            str(workers): bandwidth(workers, mebibytes) for workers in sorted({1, min(2, cores), cores})
        },
        "float32_matrix_ops_per_s": matrix_peak(size),
        "client_requests_per_s": asked,
        "client_events_per_s": streamed,
    }


def described(bounds: Json, model: Path | None = None) -> str:
    """The limits as text; with a model file also its highest tokens per second."""
    reads = {int(workers): rate for workers, rate in bounds["read_bytes_per_s"].items()}
    lines = [
        f"read bandwidth, {workers} thread{'s' * (workers > 1)}: {rate / 1e9:.1f} GB/s"
        for workers, rate in reads.items()
    ]
    lines += [
        f"matrix peak, float32: {bounds['float32_matrix_ops_per_s'] / 1e9:.0f} GFLOP/s",
        f"this client: {bounds['client_requests_per_s']:,.0f} requests/s",
        f"this client: {bounds['client_events_per_s']:,.0f} streamed events/s",
    ]
    if model is not None:
        best, gigabytes = max(reads.values()), model.stat().st_size / 1e9
        lines.append(f"{model.name}, {gigabytes:.3f} GB: at most {best / 1e9 / gigabytes:.1f} tok/s in one stream")
    return "\n".join(lines)


class _Canned(asyncio.Protocol):
    """Responds to each request at once: with a stream whose events are written one by one, or with a short body."""

    def __init__(self, events: int) -> None:
        self.events = events

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        choice = b'{"id":"cmpl-0","choices":[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}'
        head = b"HTTP/1.1 200 OK\r\nContent-Type: "
        if not data.startswith(b"POST /stream"):
            length = str(len(choice)).encode()
            self.transport.write(head + b"application/json\r\nContent-Length: " + length + b"\r\n\r\n" + choice)
            return
        self.transport.write(head + b"text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        asyncio.get_running_loop().create_task(self._stream(b"data: " + choice + b"\n\n"))

    async def _stream(self, event: bytes) -> None:
        chunk = b"%x\r\n%b\r\n" % (len(event), event)
        for _ in range(self.events):
            self.transport.write(chunk)
            await asyncio.sleep(0)
        self.transport.write(b"0\r\n\r\n")


def _serve_canned(pipe: Connection, events: int) -> None:
    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Canned(events), "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(serve())


def _shortest(work: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        started = perf_counter()
        work()
        times.append(perf_counter() - started)
    return min(times)  # the shortest time is the least disturbed by other programs


def _cpu_facts() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}
