"""Fixtures for tests of the kernels that multiply quantized weights."""

from __future__ import annotations

import ctypes

import pytest

from afterword.engine.llama import accelerator


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL) -> ctypes.CDLL:
    if not accelerator.supports_quantized():
        pytest.skip("this processor lacks the instructions for products of bytes")
    return accelerator_library
