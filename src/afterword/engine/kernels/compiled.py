"""The files of the compiled kernels: hatch_build.py compiles `x.cpp` to `libx.so` beside it during the installation.

Without a compiler the file does not exist. The modules that load a library check for it and use other code.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
"""The folder of the C++ sources and of their libraries."""


OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def library(source: Path) -> Path:
    """The library of a source; the file may not exist."""
    return source.with_name(f"lib{source.stem}.so")


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
        found.update(path.read_bytes() if path.exists() else b"none")
    return found.hexdigest()
