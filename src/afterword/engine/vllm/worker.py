"""The main program of the worker process with vLLM: reads frames, runs jobs, writes frames. It ends with its parent.

The threads of the process are the main thread with the event loop on which vLLM runs, a reader, the tokenizer threads,
and one that sends heartbeats. vLLM's forward passes run in processes of their own.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import NoReturn

from afterword.engine import messages
from afterword.engine.protocol import Load, Step
from afterword.engine.vllm import library
from afterword.engine.vllm.jobs import VllmJobs
from afterword.engine.vllm.requests import SampleOutput, SampleRequest
from afterword.engine.worker import parent_process
from afterword.engine.worker.tokenizer_threads import TokenizerThreads
from afterword.errors import AfterwordError
from afterword.system.tasks import switch_threads_soon, vital_thread

_HEARTBEAT_SECONDS = 1.0
_PING_SECONDS = 0.5  # between two looks at whether vLLM's processes make progress


def main() -> None:
    """Run the worker. The last two arguments of the command line are the file descriptors of its sockets."""
    from_server, to_server = parent_process.sockets(sys.argv)
    parent_process.die_with_parent(from_server)
    parent_process.unblock_signals()
    parent_process.keep_memory_private()
    switch_threads_soon()
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the server's; libraries write to it
    asyncio.run(_VllmWorker(from_server, to_server).main())


class _VllmWorker:
    """Owns the sockets to the server process and the jobs."""

    def __init__(self, from_server: socket.socket, to_server: socket.socket) -> None:
        self._stream = from_server.makefile("rb")
        self._to_server = to_server
        self._sending = threading.Lock()
        self._tokenizer_threads: TokenizerThreads | None = None
        self._jobs: VllmJobs | None = None
        self._heartbeat = messages.Heartbeat(0, 0, 0, 0.0, loaded=0.0)

    async def main(self) -> None:
        """Load the model that the first frame names, then run jobs until the parent ends."""
        body = messages.read(self._stream)
        settings = messages.unpack_for_worker(body) if body else None
        if not isinstance(settings, messages.LoadVllm):
            return
        loop = asyncio.get_running_loop()
        vital_thread(self._send_heartbeats, name="heartbeat")
        vital_thread(self._read, loop, name="reader")  # already while loading: it notices the end of the parent
        try:
            model = library.open_model(settings)
        except AfterwordError as error:
            self._send(messages.LoadFailure(error.message))
            os._exit(0)  # vLLM may have left threads that would keep the process alive
        generate = partial(_generate, model)
        model_info = model.model_info
        self._jobs = VllmJobs(generate, self._send_steps, model_info.sequences, len(model_info.pieces))
        self._tokenizer_threads = TokenizerThreads(model.tokenizer.parts, self._send)
        self._tokenizer_threads.start()
        self._heartbeat = messages.Heartbeat(0, 0, 0, 0.0)
        self._send(messages.ModelReady(model_info))
        await self._watch(model)

    async def _watch(self, model: library.LoadedVllm) -> NoReturn:
        """Measure how long vLLM takes to answer between two passes, so that the supervisor notices if it hangs."""
        assert self._jobs is not None
        passes, slowest = 0, 0.0
        while True:
            await asyncio.sleep(_PING_SECONDS)
            if not self._jobs.is_running and not model.llm.errored:
                continue
            largest = model.batch_tokens if passes else 0
            self._heartbeat = messages.Heartbeat(passes, model.batch_tokens, largest, slowest)
            start = time.monotonic()
            try:
                await model.ping()
            except model.death as problem:
                _end(problem)
            passes, slowest = passes + 1, max(slowest, time.monotonic() - start)
            self._heartbeat = messages.Heartbeat(passes, 0, model.batch_tokens, slowest)

    # ---- messages

    def _read(self, loop: asyncio.AbstractEventLoop) -> NoReturn:
        while body := messages.read(self._stream):
            message = messages.unpack_for_worker(body)
            if isinstance(message, messages.JobMessage):
                assert self._jobs is not None, "a job came before the model was ready"
                loop.call_soon_threadsafe(self._jobs.apply, message)
                continue
            assert self._tokenizer_threads is not None, "a text came before the model was ready"
            if isinstance(message, messages.TokenizeText):
                self._tokenizer_threads.add(message)
            elif isinstance(message, messages.CancelTokenize):
                self._tokenizer_threads.cancel(message.call)
        parent_process.kill_group()  # the parent has ended

    def _send_steps(self, steps: dict[int, Step], load: Load) -> None:
        self._send(messages.PassDone(steps, load))

    def _send_heartbeats(self) -> NoReturn:
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            short, long = self._tokenizer_threads.parts if self._tokenizer_threads else (0, 0)
            now = self._heartbeat
            self._send(
                messages.Heartbeat(now.passes, now.tokens, now.largest, now.slowest, now.loaded, parts=(short, long))
            )

    def _send(self, message: messages.ServerMessage) -> None:
        data = messages.pack(message)
        with self._sending:
            try:
                self._to_server.sendall(data)
            except OSError:
                parent_process.kill_group()  # the parent has ended


async def _generate(model: library.LoadedVllm, request: SampleRequest) -> AsyncGenerator[SampleOutput]:
    """Run a request. If vLLM's processes have ended, end this one too."""
    try:
        async with aclosing(model.generate(request)) as outputs:
            async for output in outputs:
                yield output
    except model.death as problem:
        _end(problem)


def _end(problem: Exception) -> NoReturn:
    """End the process because vLLM's processes have ended. The supervisor kills their group and starts another one."""
    print(f"vLLM has ended: {problem}", file=sys.stderr, flush=True)
    os._exit(1)
