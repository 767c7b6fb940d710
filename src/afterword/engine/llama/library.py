"""Finds llama.cpp, loads it with the environment that reproducible numbers need, and collects its log.

The library is loaded when `native` is first asked for a function. It is, in this order:

1. what the environment variable `AFTERWORD_LLAMA` names: a library, or a folder that contains libllama;
2. the library in the installed package llama-cpp-python, which is compiled for the machine;
3. the library in the installed package xllamacpp, which is prebuilt.

By default llama.cpp logs to stderr. This module keeps its last error lines, so that an error message can contain the
reason, and writes the log to stderr only in verbose mode.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import platform
import sys
from collections import deque
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TextIO

from afterword.engine.kernels import compiled, openmp_library
from afterword.engine.llama.bindings import CONSTANTS, STRUCTURES, LogCallback, open_library
from afterword.errors import SettingError

# Otherwise ggml starts a debugger on this process when native code aborts.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")
# Otherwise matmuls of K-quants add in another order from 8 rows on than below.
os.environ.setdefault("GGML_CPU_TILED_MM", "0")
# The iterations for which an OpenMP thread spins before it sleeps. The default is far larger. When other processes use
# the cores, spinning threads then wait in every operation for a thread that has no core.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

VARIABLE = "AFTERWORD_LLAMA"
_PREBUILT = "xllamacpp"  # the package
_NAMES = ("libllama.so", "libllama.dylib")
_last_errors: deque[str] = deque(maxlen=8)
_shown: list[TextIO] = []
_serial_openmp: list[ctypes.CDLL] = []  # of openmp_library.py, where it was loaded


class NativeLibrary:
    """llama.cpp's functions, structures and constants by their C names. Raises `SettingError` if it cannot be loaded.

    Functions that bindings.py does not declare have no types; the tests call some.
    """

    def __getattr__(self, name: str) -> Any:
        if not name.lower().startswith(("llama_", "ggml_")):
            raise AttributeError(name)
        found = STRUCTURES.get(name) or CONSTANTS.get(name)
        if found is None:
            found = getattr(self.handle, name)
        setattr(self, name, found)  # so that this method is not called again
        return found

    @property
    def handle(self) -> ctypes.CDLL:
        """The loaded library. Its symbols include those of ggml."""
        return _load()


native = NativeLibrary()


@cache
def _load() -> ctypes.CDLL:
    found = path()
    if found.parent.name == _PREBUILT and platform.machine() == "x86_64" and compiled.below_all_levels():
        raise SettingError(
            "The prebuilt llama.cpp needs a processor with AVX2, which this one has not. Install llama-cpp-python, "
            "which is compiled for the machine (in a checkout: make native)."
        )
    if found.parent.name == _PREBUILT and sys.platform == "linux" and not _has_libgomp():
        _serial_openmp.extend(filter(None, [openmp_library.load()]))
    return open_library(found)


def _has_libgomp() -> bool:
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        return False
    return True


def openmp_is_serial() -> bool:
    """Whether Afterword's functions of OpenMP, which use one thread, take the place of the system's libgomp."""
    return bool(_serial_openmp)


def path() -> Path:
    """The library's file. Raises `SettingError` if there is none."""
    named = os.environ.get(VARIABLE)
    if named:
        return _named(Path(named).expanduser())
    native_files = (_in_folder(folder / "lib") for folder in _package("llama_cpp"))
    prebuilt_files = (file for folder in _package(_PREBUILT) for file in folder.glob("xllamacpp*.so"))
    found = next((file for file in itertools.chain(native_files, prebuilt_files) if file), None)
    if found is None:
        packages = "llama-cpp-python or xllamacpp"
        raise SettingError(f"llama.cpp is not installed. Install {packages}, or name a library with {VARIABLE}.")
    return found


def files() -> list[Path]:
    """The library's file and the libraries of ggml beside it. Their content is part of the fingerprint."""
    library = path().resolve()
    others = {each.resolve() for each in path().parent.glob("*ggml*") if each.is_file()}
    return [library, *sorted(others - {library})]


def _package(name: str) -> list[Path]:
    """The folders of an installed package. They are found without importing it."""
    spec = find_spec(name)
    return list(map(Path, (spec and spec.submodule_search_locations) or ()))


def _named(place: Path) -> Path:
    found = _in_folder(place) if place.is_dir() else place if place.is_file() else None
    if found is None:
        raise SettingError(f"{VARIABLE} is {place}, but that is neither a library nor a folder with {_NAMES[0]}.")
    return found.absolute()


def _in_folder(folder: Path) -> Path | None:
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


@LogCallback  # type: ignore[untyped-decorator]
def _log(level: int, text: bytes, _: object) -> None:
    line = text.decode("utf-8", "replace")
    if level == CONSTANTS["GGML_LOG_LEVEL_ERROR"]:
        _last_errors.append(line.strip())
    for stream in _shown:
        stream.write(line)


def initialize(verbose: bool) -> None:
    """Initialize the library. Call it once per process. `verbose`: write the log to stderr. Raises `SettingError`."""
    if verbose:
        _shown.append(sys.stderr)
    native.llama_log_set(_log, None)
    native.llama_backend_init()


def last_error() -> str:
    """The oldest of the last error lines in the log, because later ones are usually its consequences."""
    return _last_errors[0] if _last_errors else "no reason was given"


def metadata(model: object, key: bytes) -> str:
    """A value of the model file's metadata, empty if the key is missing."""
    value = ctypes.create_string_buffer(256)
    found = native.llama_model_meta_val_str(model, key, value, 256) >= 0
    return value.value.decode("utf-8", "replace") if found else ""


def check_architecture(path: str, architecture: str) -> None:
    """Raise `SettingError` if a context of the model in `path` would end the process.

    Of the known versions, only llama.cpp 0.6.0-dev does that, by a division by zero (2026-11-30).
    """
    if architecture == "deepseek4" and native.llama_version().startswith(b"0.6."):
        raise SettingError(
            f"{path} cannot be served. Its architecture is {architecture}, and the prebuilt llama.cpp ends its process "
            "when it creates a context. `make native` installs a llama.cpp that serves it."
        )


def version() -> str:
    """Version and build flags of the library; part of the fingerprint."""
    return f"{native.llama_version().decode()} {native.llama_print_system_info().decode().strip()}"
