"""The main program of the worker process that uses a vLLM server."""

from __future__ import annotations

import asyncio
from typing import NoReturn

import msgspec

from afterword.engine import messages
from afterword.engine.http.model import UpstreamModel
from afterword.engine.http.opening import open_model
from afterword.engine.vllm.job_worker import JobWorker
from afterword.engine.vllm.jobs import SampleSink, read_into
from afterword.engine.vllm.requests import SampleRequest

_TICK_SECONDS = 0.5


def main() -> None:
    """Run the worker. The last two arguments of the command line are the file descriptors of its sockets."""
    _UpstreamWorker.run()


class _UpstreamWorker(JobWorker[UpstreamModel]):
    async def open(self, settings: messages.LoadMessage) -> UpstreamModel:
        assert isinstance(settings, messages.LoadUpstream)
        return await open_model(settings)

    async def generate(self, model: UpstreamModel, request: SampleRequest, sink: SampleSink) -> None:
        await read_into(sink, model.generate(request))

    async def watch(self, model: UpstreamModel) -> NoReturn:
        """Count the turns of the event loop as passes. How long the upstream may take is decided for each request."""
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            self.heartbeat = msgspec.structs.replace(self.heartbeat, passes=self.heartbeat.passes + 1)
