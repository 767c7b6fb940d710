"""`python -m bench.attention`: the time of one operation of the attention kernel, with and without a sliding window.

It measures CPU time of one thread: minimum and median of the repetitions, in microseconds. The heads are those of small
Gemma 3 models: four query heads and one head of keys, with 256 elements. An argument names the library to measure.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import thread_time

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np

from afterword.engine.llama.accelerator import LIBRARY
from ggml_tensors import tensor, with_sources

HEADS, HEAD_SIZE, WINDOW = 4, 256, 512
REPEAT = 20
CASES = (  # streams, tokens of each, cells of each
    *((1, 1, 1024), (1, 1, 8192), (1, 1, 32768)),
    *((16, 1, 8192), (1, 256, 8192)),
)


def main() -> None:
    """Print the table."""
    kernels = ctypes.CDLL(sys.argv[1] if len(sys.argv) > 1 else str(LIBRARY))
    print(f"{'streams':>8}{'tokens':>8}{'cells':>8}{'window':>8}{'minimum':>12}{'median':>12}")
    for streams, tokens, cells in CASES:
        for window in (WINDOW, None):
            found = _measure(_operation(kernels, streams, tokens, cells, window or cells))
            print(
                f"{streams:8}{tokens:8}{cells:8}{window or '-':>8}{min(found):12.0f}{median(found):12.0f}", flush=True
            )


def _operation(kernels: ctypes.CDLL, streams: int, tokens: int, cells: int, window: int) -> Callable[[], None]:
    """An operation in which the tokens are the last ones of full streams."""
    random = np.random.default_rng(0)
    queries = random.standard_normal((streams, HEADS, tokens, HEAD_SIZE), np.float32)
    keys, values = (random.standard_normal((streams, 1, cells, HEAD_SIZE), np.float32).astype(np.float16) for _ in "kv")
    distance = cells - tokens + np.arange(tokens)[:, None] - np.arange(cells)
    hidden = np.where((distance >= 0) & (distance < window), 0, -np.inf).astype(np.float16)
    mask = np.ascontiguousarray(np.broadcast_to(hidden, (streams, 1, tokens, cells)))
    output = np.zeros((streams, tokens, HEADS, HEAD_SIZE), np.float32)
    operands = (output, queries, keys, values, mask)  # kept alive by `run`
    node = with_sources(*map(tensor, operands))
    node.params[:3] = [HEAD_SIZE**-0.5, 0.0, 0.0]

    def run(_: object = operands) -> None:
        kernels.operation_compute(b"FLASH_ATTN_EXT", ctypes.byref(node), 1)

    return run


def _measure(operation: Callable[[], None]) -> list[float]:
    """Microseconds of each repetition."""
    found = []
    for _ in range(REPEAT):
        start = thread_time()
        operation()
        found.append(1e6 * (thread_time() - start))
    return found


if __name__ == "__main__":
    main()
