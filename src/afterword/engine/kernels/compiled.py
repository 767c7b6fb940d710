"""The files of the compiled kernels, which hatch_build.py compiles during the installation.

An installation from the source has one file for each library, `libx.so`, compiled for the machine. A wheel has one for
each level of instructions, such as `libx.x86-64-v3.so`; the best one that this processor can execute is loaded. All
levels shall compute the same bits (`make bits`). Where there is no file, the modules that load it use other code.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import sys
from functools import cache
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
"""The folder of the C++ sources and of their libraries."""

LEVELS = {
    "x86_64": ("x86-64-v3", "x86-64-v3-avxvnni", "x86-64-v4", "x86-64-v4-avx512vnni"),
    "aarch64": ("armv8.2-a-dotprod",),
}
"""Levels of instructions by `platform.machine`, the best last. processor.cpp numbers them in this order."""

OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def library(source: Path) -> Path:
    """The library of a source that this processor can execute; the file may not exist."""
    native = source.with_name(f"lib{source.stem}.so")
    if native.exists():
        return native
    files = (source.with_name(f"lib{source.stem}.{level}.so") for level in reversed(processor_levels()))
    return next(filter(Path.exists, files), native)


@cache
def processor_levels() -> tuple[str, ...]:
    """The levels of this processor, the best last. Empty too if the installation has no kernels for levels."""
    path = KERNELS / "libprocessor.so"
    if not path.exists():
        return ()
    found = ctypes.CDLL(str(path)).processor_levels()
    return tuple(level for i, level in enumerate(LEVELS.get(platform.machine(), ())) if found >> i & 1)


def below_all_levels() -> bool:
    """Whether this processor is known to have none of the levels."""
    return (KERNELS / "libprocessor.so").exists() and not processor_levels()


def why_missing() -> str:
    """Why there is no library for this processor, for messages."""
    if not below_all_levels():
        return "the installation has none"
    return f"the installation has none for processors below {LEVELS.get(platform.machine(), ('any level',))[0]}"


def memory_on_demand() -> bool:
    """Whether the KV cache of a CPU can take memory as tokens are written (kv_buffers.hpp).

    It cannot where the system reserves memory for all addresses.
    """
    return sys.platform == "linux" and library(KERNELS / "accelerator.cpp").exists() and not _reserves_memory()


def _reserves_memory() -> bool:
    try:
        return OVERCOMMIT.read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False


def digest(*libraries: Path) -> str:
    """A SHA-256 over the contents of the libraries, in hexadecimal. It differs if one of them is missing."""
    found = hashlib.sha256()
    for path in libraries:
        if not path.exists():
            found.update(b"none")
            continue
        with path.open("rb") as file:  # in parts: a prebuilt llama.cpp has 100 MB
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()
