"""The main program of the worker process with vLLM: its forward passes run in processes that this one starts.

vLLM's own event loop code runs on the main thread, beside `job_worker`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from typing import NoReturn

from afterword.engine import messages
from afterword.engine.vllm import library
from afterword.engine.vllm.job_worker import JobWorker
from afterword.engine.vllm.jobs import SampleSink
from afterword.engine.vllm.requests import SampleRequest

_PING_SECONDS = 0.5  # between two looks at whether vLLM's processes make progress


def main() -> None:
    """Run the worker. The last two arguments of the command line are the file descriptors of its sockets."""
    _VllmWorker.run()


class _VllmWorker(JobWorker[library.LoadedVllm]):
    async def open(self, settings: messages.LoadMessage) -> library.LoadedVllm:
        assert isinstance(settings, messages.LoadVllm)
        return library.open_model(settings)

    async def generate(self, model: library.LoadedVllm, request: SampleRequest, sink: SampleSink) -> None:
        """Run a request. If vLLM's processes have ended, end this one too."""
        try:
            await model.generate(request, sink.take)
        except model.death as problem:
            _end(problem)

    async def watch(self, model: library.LoadedVllm) -> NoReturn:
        """Measure how long vLLM takes to answer between two passes."""
        assert self.jobs is not None
        passes, slowest = 0, 0.0
        while True:
            await asyncio.sleep(_PING_SECONDS)
            if not self.jobs.is_running and not model.llm.errored:
                continue
            largest = model.batch_tokens if passes else 0
            self.heartbeat = messages.Heartbeat(passes, model.batch_tokens, largest, slowest)
            start = time.monotonic()
            try:
                await model.ping()
            except model.death as problem:
                _end(problem)
            passes, slowest = passes + 1, max(slowest, time.monotonic() - start)
            self.heartbeat = messages.Heartbeat(passes, 0, model.batch_tokens, slowest)


def _end(problem: Exception) -> NoReturn:
    """End the process because vLLM's processes have ended. The supervisor kills their group and starts another one."""
    print(f"vLLM has ended: {problem}", file=sys.stderr, flush=True)
    os._exit(1)
