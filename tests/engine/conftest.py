"""Fixtures for tests of the compiled kernels, which are built when the package is installed."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import pytest

from afterword.engine.llama import accelerator, library


@pytest.fixture(scope="session")
def accelerator_library(compiled_kernels: None) -> ctypes.CDLL:
    library.initialize(verbose=False)
    accelerator.use_thread_pool(alone=False)
    return ctypes.CDLL(str(accelerator.LIBRARY))


@pytest.fixture
def thread_pool(accelerator_library: ctypes.CDLL) -> Iterator[int | None]:
    """Activate the kernels' thread pool, as for a model whose operations the kernels compute completely.

    The value is the address of the function that runs work in the pool; None without kernels.
    """
    yield accelerator.use_thread_pool(alone=True)
    accelerator.use_thread_pool(alone=False)
