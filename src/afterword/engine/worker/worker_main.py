"""The main program of the worker process: reads frames, runs forward passes, writes frames. It ends with its parent.

The library that computes is an argument of `serve`. The threads of the process are:

- the main thread, which loads the model and computes;
- a reader, so that a cancellation takes effect between two passes;
- the tokenizer threads (`tokenizer_threads`);
- a thread that sends heartbeats.
"""

from __future__ import annotations

import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import msgspec

from afterword.engine import messages
from afterword.engine.core.draft_model import DraftModel
from afterword.engine.core.engine_loop import MEMORY_CHECK_SECONDS, EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits, Runner
from afterword.engine.core.prefix_store import PrefixStore
from afterword.engine.grammar.grammar_threads import GrammarThreads
from afterword.engine.protocol import ModelInfo
from afterword.engine.store_stats import StoreStats
from afterword.engine.worker import parent_process
from afterword.engine.worker.tokenizer_threads import Tokenizer, TokenizerThreads
from afterword.errors import AfterwordError, EngineError
from afterword.system.tasks import switch_threads_soon, vital_thread

ReportProgress = Callable[[float], None]
"""Called with the loaded share of the model, from 0 to 1."""

_TOO_LITTLE_MEMORY = (
    "There is too little memory to load the model: the limit of the process (ulimit -v) or of its container is too low."
)
_IDLE_SECONDS = 0.5
_HEARTBEAT_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A loaded draft model. The fields are parameters of `DraftModel`."""

    runner: Runner
    context: int
    vocabulary: int


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A loaded model. `thread_pool` and `store`: see `EngineLoop`. `store_stats` is called from any thread.

    `token_texts`: see `GrammarThreads`; without it, jobs with a grammar fail. `draft`: None if no model drafts.

    `check` raises `EngineError` if the model's files have changed; then no result may be used any more. It is called
    from any thread, every second and after each pass.
    """

    runner: Runner
    model_info: ModelInfo
    tokenize: Tokenizer
    thread_pool: int | None = None
    check: Callable[[], None] = lambda: None
    store: PrefixStore | None = None
    store_stats: Callable[[], StoreStats] = StoreStats
    token_texts: Sequence[bytes] | None = None
    draft: LoadedDraft | None = None


def serve(load: Callable[[messages.LoadModel, ReportProgress], LoadedModel]) -> None:
    """Run the worker. The command line arguments are two file descriptors of sockets: one to read, one to write.

    `load` may raise `SettingError`; its message is sent to the parent.
    """
    from_server, to_server = parent_process.sockets(sys.argv)
    parent_process.die_with_parent(from_server)
    parent_process.keep_memory_private()
    _Worker(from_server, to_server).main(load)


class PassMonitor:
    """A runner that counts and times its passes for the heartbeats. One thread calls `run`.

    `draft`: the monitor of the draft model's runner. Its passes are progress too.
    """

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.monotonic) -> None:
        self.slots, self.chunk, self.grid = runner.slots, runner.chunk, runner.grid
        self.joins_prompts = runner.joins_prompts
        self.capacity, self.can_truncate = runner.capacity, runner.can_truncate
        self.min_shared_tokens, self.max_snapshots = runner.min_shared_tokens, runner.max_snapshots
        self.cached_tokens, self.free_tokens = runner.cached_tokens, runner.free_tokens
        self._runner = runner
        self._clock = clock
        self._passes = self._tokens = self._largest = 0
        self._slowest = 0.0
        self.draft: PassMonitor | None = None

    def run(self, batch: ForwardBatch) -> Logits:
        """See `core.forward_batch.Runner.run`."""
        start, tokens = self._clock(), sum(len(entry.tokens) for entry in batch.entries)
        self._tokens = tokens
        logits = self._runner.run(batch)
        self._slowest = max(self._slowest, self._clock() - start)
        self._largest = max(self._largest, tokens)
        self._passes, self._tokens = self._passes + 1, 0
        return logits

    def heartbeat(self) -> messages.Heartbeat:
        """The heartbeat message of this moment. May be called from any thread."""
        passes, tokens = self._passes, self._tokens
        if self.draft is not None:
            passes, tokens = passes + self.draft._passes, tokens or self.draft._tokens
        return messages.Heartbeat(passes, tokens, self._largest, self._slowest)


def apply_message(loop: EngineLoop, message: messages.WorkerMessage) -> None:
    """Apply a message about a job to the engine loop."""
    match message:
        case messages.StartJob():
            loop.start(message.job_id, message.job)
        case messages.DropSample():
            loop.drop(message.job_id, message.sample)
        case messages.CloseJob():
            loop.close(message.job_id)
        case messages.PauseJob():
            loop.pause(message.job_id)
        case messages.ResumeJob():
            loop.resume(message.job_id)
        case _:
            raise AssertionError(f"not a message for a running worker: {type(message).__name__}")


class _Worker:
    """Owns the sockets to the server process and the queue of messages for the main thread."""

    def __init__(self, from_server: socket.socket, to_server: socket.socket) -> None:
        self._to_server = to_server
        self._monitor: PassMonitor | None = None
        self._check: Callable[[], None] = lambda: None  # see `LoadedModel`
        self._store_stats: Callable[[], StoreStats] = StoreStats
        self._loaded = 0.0
        self._stream = from_server.makefile("rb")
        self._sending = threading.Lock()
        self._jobs: queue.SimpleQueue[messages.WorkerMessage] = queue.SimpleQueue()
        self._tokenizer_threads: TokenizerThreads | None = None

    def main(self, load: Callable[[messages.LoadModel, ReportProgress], LoadedModel]) -> None:
        """Load the model that the first frame names, then compute until the parent ends."""
        body = messages.read(self._stream)
        settings = messages.unpack_for_worker(body) if body else None
        if not isinstance(settings, messages.LoadModel):
            return
        switch_threads_soon()
        try:
            loaded = self._start(settings, load)
        except AfterwordError as error:
            self._send(messages.LoadFailure(error.message))
            return
        except MemoryError:
            self._send(messages.LoadFailure(_TOO_LITTLE_MEMORY))
            return
        grammars = None if loaded.token_texts is None else GrammarThreads(loaded.token_texts)
        self._send(messages.ModelReady(loaded.model_info))
        self._monitor = PassMonitor(loaded.runner)
        loop = EngineLoop(self._monitor, threads=settings.threads, thread_pool=loaded.thread_pool)
        loop.use_store(loaded.store)
        loop.use_pieces(loaded.model_info.pieces)
        if grammars is not None:
            loop.use_grammars(grammars)
        if settings.speculate == "ngram":
            loop.draft_ngrams()
        if draft := loaded.draft:
            runner = self._monitor.draft = PassMonitor(draft.runner)
            model = DraftModel(runner, draft.context, draft.vocabulary, time.perf_counter)
            loop.use_draft_model(model, partial(print, file=sys.stderr, flush=True))
        self._work(loop)

    def _start(
        self, settings: messages.LoadModel, load: Callable[[messages.LoadModel, ReportProgress], LoadedModel]
    ) -> LoadedModel:
        """Load the model and start the threads. Raises `SettingError`, and `MemoryError` under a low limit."""
        vital_thread(self._send_heartbeats, name="heartbeat")
        vital_thread(self._read, name="reader")  # already while loading: it notices the end of the parent
        loaded = load(settings, self._report_progress)
        self._check, self._store_stats = loaded.check, loaded.store_stats
        self._tokenizer_threads = TokenizerThreads(loaded.tokenize, self._send)
        self._tokenizer_threads.start()
        return loaded

    def _read(self) -> NoReturn:
        while body := messages.read(self._stream):
            message = messages.unpack_for_worker(body)
            if not isinstance(message, messages.TokenizeText | messages.CancelTokenize):
                self._jobs.put(message)
                continue
            assert self._tokenizer_threads is not None, "a text came before the model was ready"
            if isinstance(message, messages.TokenizeText):
                self._tokenizer_threads.add(message)
            else:
                self._tokenizer_threads.cancel(message.call)
        os._exit(0)  # the parent has ended: do not wait for a running pass or load

    def _report_progress(self, share: float) -> None:
        self._loaded = share  # part of the next heartbeat

    def _send_heartbeats(self) -> NoReturn:
        while True:
            time.sleep(_HEARTBEAT_SECONDS)
            self._end_if_changed()
            heartbeat = self._monitor.heartbeat() if self._monitor else messages.Heartbeat(0, 0, 0, 0.0, self._loaded)
            short, long = self._tokenizer_threads.parts if self._tokenizer_threads else (0, 0)
            self._send(msgspec.structs.replace(heartbeat, parts=(short, long), store=self._store_stats()))

    def _work(self, loop: EngineLoop) -> NoReturn:
        idle = True
        while True:
            changed = self._take(loop, wait=idle)
            steps = loop.step()
            self._end_if_changed()  # before results of the pass are sent
            idle = steps is None
            if steps or changed or loop.waits:  # a message shows that the worker does not hang
                self._send(messages.PassDone(steps or {}, loop.load(), loop.pass_stats()))

    def _take(self, loop: EngineLoop, wait: bool) -> bool:
        """Apply all received messages, and with `wait` wait for the first. Returns whether there was any."""
        taken = False
        while True:
            try:
                message = self._wait(loop) if wait and not taken else self._jobs.get_nowait()
            except queue.Empty:
                return taken
            taken = True
            apply_message(loop, message)

    def _wait(self, loop: EngineLoop) -> messages.WorkerMessage:
        """The next message. After `_IDLE_SECONDS` without one, check the invariants: a violation ends the worker."""
        try:
            return self._jobs.get(timeout=_IDLE_SECONDS)
        except queue.Empty:
            loop.check()
        while True:
            loop.give_back_memory()
            try:
                return self._jobs.get(timeout=MEMORY_CHECK_SECONDS)
            except queue.Empty:
                continue

    def _end_if_changed(self) -> None:
        """End the process if the model's files have changed. The supervisor then starts another worker."""
        try:
            self._check()
        except EngineError as error:
            print(error.message, file=sys.stderr, flush=True)
            os._exit(1)

    def _send(self, message: messages.ServerMessage) -> None:
        data = messages.pack(message)
        with self._sending:
            try:
                self._to_server.sendall(data)
            except OSError:
                os._exit(0)  # the parent has ended
