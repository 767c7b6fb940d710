"""Loads llama.cpp with the environment that reproducible numbers need, and collects its log.

By default llama.cpp logs to stderr. This module keeps its last error lines, so that an error message can contain the
reason, and writes the log to stderr only in verbose mode.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from typing import TextIO

# Otherwise ggml starts a debugger on this process when native code aborts.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
# Otherwise matmuls of K-quants add in another order from 8 rows on than below.
os.environ.setdefault("GGML_CPU_TILED_MM", "0")
# The iterations for which an OpenMP thread spins before it sleeps. The default is far larger. When other processes use
# the cores, spinning threads then wait in every operation for a thread that has no core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import llama_cpp.llama_cpp as native

_ERROR = 4
_last_errors: deque[str] = deque(maxlen=8)
_shown: list[TextIO] = []


@native.llama_log_callback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: object) -> None:
    line = text.decode("utf-8", "replace")
    if level == _ERROR:
        _last_errors.append(line.strip())
    for stream in _shown:
        stream.write(line)


def initialize(verbose: bool) -> None:
    """Initialize the library. Call it once per process. `verbose`: write the log to stderr."""
    if verbose:
        _shown.append(sys.stderr)
    native.llama_log_set(_log, None)
    native.llama_backend_init()


def last_error() -> str:
    """The oldest of the last error lines in the log, because later ones are usually its consequences."""
    return _last_errors[0] if _last_errors else "no reason was given"


def version() -> str:
    """Version and build flags of the library; part of the fingerprint."""
    return f"{native.llama_version().decode()} {native.llama_print_system_info().decode().strip()}"


__all__ = ["initialize", "last_error", "native", "version"]
