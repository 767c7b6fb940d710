"""The native library, loaded quietly.

llama.cpp logs to stderr unless told otherwise. Here its last words are kept, so that a failure can be explained in
a sentence, and are shown only when asked for.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from typing import TextIO

# An abort in native code would otherwise start a debugger on this process.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
# Products of K-quants with 8 rows and more would be summed in another order than those with fewer.
os.environ.setdefault("GGML_CPU_TILED_MM", "0")
# How often a thread asks whether the others are ready before it sleeps. By default it asks far longer, and beside other
# work of the machine threads then wait for one that has no core, at every operation.
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
    """Initialise the library once per process."""
    if verbose:
        _shown.append(sys.stderr)
    native.llama_log_set(_log, None)
    native.llama_backend_init()


def last_error() -> str:
    """The first of the errors that the library reported last: later ones are its consequences."""
    return _last_errors[0] if _last_errors else "no reason was given"


def version() -> str:
    """Version and build flags of the library: part of what a number depends on."""
    return f"{native.llama_version().decode()} {native.llama_print_system_info().decode().strip()}"


__all__ = ["initialize", "last_error", "native", "version"]
