"""Finds the architectures that the installed llama.cpp knows, by asking it.

The library has no function that lists them. Their names are among the texts in its file; for each such text a file
that names it as its architecture is loaded, and the library says whether it knows the architecture.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from functools import cache
from pathlib import Path

from afterword.engine.llama import library
from afterword.engine.llama.library import native

library.initialize(verbose=False)

_NAME = re.compile(rb"[a-z][a-z0-9_.-]{1,20}")
_NEAR = 2**24  # the names lie within so many bytes of the message; a prebuilt library has 100 million bytes
_NOT_ALONE = frozenset(("clip",))  # a projector, which is part of another model


@cache
def architectures() -> frozenset[str]:
    """The names of all architectures that the library knows, other than projectors."""
    content = library.path().read_bytes()
    place = content.index(b"unknown model architecture")
    texts = content[max(place - _NEAR, 0) : place + _NEAR].split(b"\0")
    # The linker stores a text that is the end of another one only once.
    found = {text[start:].decode() for text in texts if _NAME.fullmatch(text) for start in range(len(text) - 1)}
    found = {name for name in found if name[0].isalpha()} - _NOT_ALONE
    with tempfile.TemporaryDirectory() as folder:
        return frozenset(name for name in found if _is_known(Path(folder, "empty.gguf"), name))


def _is_known(path: Path, name: str) -> bool:
    path.write_bytes(_header(name.encode()))
    params = native.llama_model_default_params()
    params.vocab_only = True
    library._last_errors.clear()
    native.llama_model_load_from_file(os.fsencode(path), params)
    return "unknown model architecture" not in " ".join(library._last_errors)


def _header(name: bytes) -> bytes:
    """A GGUF file without tensors whose only key is the architecture. Thousands are written, so no library does it."""
    key = b"general.architecture"
    counts = struct.pack("<IQQ", 3, 0, 1)  # version, tensors, keys
    text = 8  # the type of the value
    return b"GGUF" + counts + struct.pack("<Q", len(key)) + key + struct.pack("<IQ", text, len(name)) + name
