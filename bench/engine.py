"""Measures the engine in this process, without HTTP: speed, and the share of time spent outside llama.cpp.

For each file and type of KV cache: prefill tok/s, decode tok/s of one and of 16 sequences, and the share of a decode
step of 16 that scheduling, sampling and bookkeeping take. Figures are in CPU time of one thread, which other programs
hardly affect; with --threads or --gpu-layers they are in wall time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from afterword.cli.model_setup import load_message
from afterword.config import EngineSettings
from afterword.engine.core.engine_loop import EngineLoop
from afterword.engine.core.forward_batch import ForwardBatch, Logits
from afterword.engine.llama import library
from afterword.engine.llama.runner import LlamaRunner
from afterword.engine.protocol import Job, Sampling
from afterword.models.gguf_facts import read_facts
from afterword.models.registry import Model

SEQUENCES = 16
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second; `own` is the share of a step of 16 sequences that is spent outside llama.cpp."""

    prompt: float
    one: float
    many: float
    own: float


class Timed:
    """A runner that adds up the time of its forward passes."""

    def __init__(self, runner: LlamaRunner, clock: Clock) -> None:
        self._runner, self._clock, self.seconds = runner, clock, 0.0
        self.slots, self.chunk, self.grid, self.capacity = runner.slots, runner.chunk, runner.grid, runner.capacity
        self.joins_prompts = runner.joins_prompts
        self.min_shared_tokens, self.cached_tokens = runner.min_shared_tokens, runner.cached_tokens
        self.can_truncate, self.max_snapshots = runner.can_truncate, runner.max_snapshots
        self.free_tokens = runner.free_tokens

    def run(self, batch: ForwardBatch) -> Logits:
        """Execute a batch, as the runner does."""
        start = self._clock()
        logits = self._runner.run(batch)
        self.seconds += self._clock() - start
        return logits


def measure(path: Path, settings: EngineSettings, read: int, written: int, clock: Clock) -> Speed:
    """Prompts of `read` tokens and answers of `written`, with `logprobs` 5, `top_p` 0.9 and penalties."""
    opened = load_message(Model(path.stem, path, "file"), read_facts(path), settings)
    llama = LlamaRunner(opened)
    runner = Timed(llama, clock)
    loop = EngineLoop(runner, threads=settings.threads or 1, thread_pool=llama.thread_pool)
    if settings.gpu_layers:  # a kernel is loaded when it is first needed
        _spend(loop, clock, [_job(read, 2), *(_job(4, 2) for _ in range(SEQUENCES))])
        _spend(loop, clock, [_job(16, 2)])
    prompt = _spend(loop, clock, [_job(read, 0)])
    one = _spend(loop, clock, [_job(16, written)])
    runner.seconds = 0.0
    jobs = [_job(4, written) for _ in range(SEQUENCES)]
    many = _spend(loop, clock, jobs)
    own = 1 - runner.seconds / many
    return Speed(read / prompt, written / one, SEQUENCES * written / many, own)


def _job(read: int, written: int) -> Job:
    tokens = tuple(random.randrange(5, 4000) for _ in range(read))
    sampling = Sampling(temperature=0.8, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.1)
    return Job(tokens, 1, written or 1, sampling, (), random.randbytes(16), alternatives=5)


def _spend(loop: EngineLoop, clock: Clock, jobs: Sequence[Job]) -> float:
    start = clock()
    for job_id, job in enumerate(jobs):
        loop.start(job_id, job)
    while loop.step() is not None:
        pass
    return clock() - start


def main(arguments: Sequence[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench engine", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument(
        "--kv-type", action="append", choices=("exact", "f16", "f32"), help="repeat for several (exact and f16)"
    )
    parser.add_argument("--threads", type=int, default=1, help="number of threads; above 1, wall time is measured (1)")
    parser.add_argument("--gpu-layers", type=int, default=0, help="as in `afterword serve`; wall time is measured (0)")
    parser.add_argument("--reproducible", action="store_true", help="as in `afterword serve`")
    parser.add_argument("--read", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--written", type=int, default=32, help="tokens of an answer (32)")
    options = parser.parse_args(arguments)
    library.initialize(verbose=False)
    clock = time.process_time if options.threads == 1 and not options.gpu_layers else time.perf_counter
    base = EngineSettings(
        context=2 * options.read,
        parallel=SEQUENCES,
        threads=options.threads,
        gpu_layers=options.gpu_layers,
        reproducible=options.reproducible,
    )
    print("| file | KV cache | prompt tok/s | one stream tok/s | 16 streams tok/s | outside llama.cpp |")
    print("|---|---|---|---|---|---|")
    for path in options.files:
        for kv_type in options.kv_type or ("exact", "f16"):
            speed = measure(path, replace(base, kv_type=kv_type), options.read, options.written, clock)
            numbers = f"{speed.prompt:.1f} | {speed.one:.1f} | {speed.many:.1f} | {speed.own:.1%}"
            print(f"| {path.name} | {kv_type} | {numbers} |", flush=True)
    return 0
