"""What was compiled when the package was installed (hatch_build.py): `x.cpp` has become `libx.so` beside it.

Where there was no compiler there is no such file, and whoever uses it has another way.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

KERNELS = Path(__file__).resolve().parent
"""The folder of the C++ sources and of their libraries."""


def library(source: Path) -> Path:
    """The file that a source becomes, whether or not it is there."""
    return source.with_name(f"lib{source.stem}.so")


def digest(*libraries: Path) -> str:
    """Names the libraries that are there as they were compiled."""
    found = hashlib.sha256()
    for path in libraries:
        found.update(path.read_bytes() if path.exists() else b"none")
    return found.hexdigest()
