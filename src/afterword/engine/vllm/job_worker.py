"""The main loop of a worker process that hands jobs to a vLLM: reads frames, runs jobs, writes frames.

Where vLLM runs is left to the subclasses: in this process's children (`worker`), or behind HTTP (`engine.http.worker`).
The threads of the process are the main thread with the event loop, a reader, the tokenizer threads, and one that sends
heartbeats. The process ends with its parent.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import sys
import threading
import time
from abc import ABC, abstractmethod
from functools import partial
from typing import Generic, NoReturn, Protocol, TypeVar

from afterword.engine import messages
from afterword.engine.protocol import Load, ModelInfo, Step
from afterword.engine.vllm.jobs import SampleSink, VllmJobs
from afterword.engine.vllm.requests import SampleRequest
from afterword.engine.vllm.tokenizer import FolderTokenizer
from afterword.engine.worker import parent_process
from afterword.engine.worker.tokenizer_threads import TokenizerThreads
from afterword.errors import AfterwordError
from afterword.system.tasks import run_loop, switch_threads_soon, vital_thread

_HEARTBEAT_SECONDS = 1.0


class OpenedModel(Protocol):
    """A model that vLLM has loaded, and the tokenizer of its folder."""

    @property
    def model_info(self) -> ModelInfo: ...

    @property
    def tokenizer(self) -> FolderTokenizer: ...


M = TypeVar("M", bound=OpenedModel)


class JobWorker(ABC, Generic[M]):
    """Owns the sockets to the server process and the jobs."""

    def __init__(self, from_server: socket.socket, to_server: socket.socket) -> None:
        self._stream = from_server.makefile("rb")
        self._to_server = to_server
        self._sending = threading.Lock()
        self._tokenizer_threads: TokenizerThreads | None = None
        self.jobs: VllmJobs | None = None
        self.heartbeat = messages.Heartbeat(0, 0, 0, 0.0, loaded=0.0)

    @classmethod
    def run(cls) -> None:
        """Run the worker. The last two arguments of the command line are the file descriptors of its sockets."""
        from_server, to_server = parent_process.sockets(sys.argv)
        parent_process.die_with_parent(from_server)
        parent_process.unblock_signals()
        parent_process.keep_memory_private()
        switch_threads_soon()
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # standard output is the server's; libraries write to it
        run_loop(cls(from_server, to_server).main())

    @abstractmethod
    async def open(self, settings: messages.LoadMessage) -> M:
        """Load the model. Raises `AfterwordError`."""

    @abstractmethod
    async def generate(self, model: M, request: SampleRequest, sink: SampleSink) -> None:
        """Run a request; see `jobs.Generate`."""

    @abstractmethod
    async def watch(self, model: M) -> NoReturn:
        """Set `heartbeat` so that the supervisor notices if the model hangs."""

    async def main(self) -> None:
        """Load the model that the first frame names, then run jobs until the parent ends."""
        body = messages.read(self._stream)
        if not body:
            return
        settings = messages.unpack_for_worker(body)
        assert isinstance(settings, messages.LoadMessage)
        loop = asyncio.get_running_loop()
        vital_thread(self._send_heartbeats, name="heartbeat")
        vital_thread(self._read, loop, name="reader")  # already while loading: it notices the end of the parent
        try:
            model = await self.open(settings)
        except AfterwordError as error:
            self._send(messages.LoadFailure(error.message))
            os._exit(0)  # vLLM may have left threads that would keep the process alive
        model_info = model.model_info

        generate = partial(self.generate, model)
        self.jobs = VllmJobs(generate, self._send_steps, model_info.sequences, len(model_info.pieces))
        self._tokenizer_threads = TokenizerThreads(model.tokenizer.parts, self._send)
        self._tokenizer_threads.start()
        self.heartbeat = messages.Heartbeat(0, 0, 0, 0.0)
        gc.collect()
        gc.freeze()  # later garbage collections skip the many objects of vLLM and its libraries
        self._send(messages.ModelReady(model_info))
        await self.watch(model)

    # ---- messages

    def _read(self, loop: asyncio.AbstractEventLoop) -> NoReturn:
        while body := messages.read(self._stream):
            message = messages.unpack_for_worker(body)
            if isinstance(message, messages.JobMessage):
                assert self.jobs is not None, "a job came before the model was ready"
                loop.call_soon_threadsafe(self.jobs.apply, message)
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
            now = self.heartbeat
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
