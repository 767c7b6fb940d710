"""Fixtures for tests of the kernels that multiply quantized weights."""

from __future__ import annotations

import ctypes

import pytest


@pytest.fixture(scope="module")
def kernel(accelerator_library: ctypes.CDLL, kernel_products: None) -> ctypes.CDLL:
    return accelerator_library
