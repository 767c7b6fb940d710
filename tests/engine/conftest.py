"""The accelerator's kernels, compiled when the package was installed."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator

import pytest

from afterword.engine.llama import accelerator, library


@pytest.fixture(scope="session")
def accelerator_library() -> ctypes.CDLL:
    if not accelerator.LIBRARY.exists():
        assert shutil.which("c++") is None, "there is a compiler, so the kernels should have been built"
        pytest.skip("no C++ compiler built the kernels")
    library.initialize(verbose=False)
    return ctypes.CDLL(str(accelerator.LIBRARY))


@pytest.fixture
def team(accelerator_library: ctypes.CDLL) -> Iterator[int | None]:
    """Threads are our own, as with a model that leaves nothing to the library. The address of what runs them."""
    yield accelerator.use_thread_pool(alone=True)
    accelerator.use_thread_pool(alone=False)
