"""Numpy arrays as ggml tensors, to call single kernels of the accelerator."""

from __future__ import annotations

import ctypes

import numpy as np

KINDS = {np.float32: 0, np.float16: 1, np.int32: 26, np.int64: 27}
F32, F16 = KINDS[np.float32], KINDS[np.float16]


class Tensor(ctypes.Structure):
    """ggml's tensor, as engine/kernels/ggml.hpp declares it."""


Tensor._fields_ = [
    ("type", ctypes.c_int32),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int32),
    ("params", ctypes.c_float * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(Tensor) * 10),
    ("view_src", ctypes.c_void_p),
    ("view_offset", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
    ("extra", ctypes.c_void_p),
    ("padding", ctypes.c_char * 8),
]


def tensor(array: np.ndarray) -> Tensor:
    """The memory of an array with four axes as a tensor. ggml numbers the axes from the last."""
    made = Tensor(type=KINDS[array.dtype.type], data=array.ctypes.data)
    made.ne[:] = array.shape[::-1]
    made.nb[:] = array.strides[::-1]
    return made


def with_sources(node: Tensor, *sources: Tensor) -> Tensor:
    """The node with its operands. The node keeps them alive."""
    for index, source in enumerate(sources):
        node.src[index] = ctypes.pointer(source)
    return node
